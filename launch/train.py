"""The target of torchrun: torchrun [OPTIONS] launch/train.py CONFIG [--section.field VALUE ...]"""

import sys

from ltrain.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
