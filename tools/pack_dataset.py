"""Tokenise documents into memory-mapped shards (`data.sources` of kind `tokens`), or check such a folder.

python tools/pack_dataset.py pack OUT --kind jsonl --path corpus/ --tokenizer path/to/model
python tools/pack_dataset.py verify OUT
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from pydantic import ValidationError

from ltrain.config.base import ConfigError
from ltrain.config.data import Jsonl, Parquet, TextTree
from ltrain.data.store import SHARD_TOKENS, TokenStore
from ltrain.data.tokenise import tokenise
from ltrain.data.tokenizer import load_tokenizer

KINDS: dict[str, type[TextTree] | type[Jsonl] | type[Parquet]] = {
    "text_tree": TextTree,
    "jsonl": Jsonl,
    "parquet": Parquet,
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line. Returns 0, or 2 where the input is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    pack = commands.add_parser("pack", help="tokenise a source into a new folder")
    pack.add_argument("out", type=Path)
    pack.add_argument("--kind", required=True, choices=list(KINDS))
    pack.add_argument("--path", required=True, help="file or folder; `stdlib` with --kind text_tree")
    pack.add_argument("--tokenizer", default="byte", help="`byte` or a Hugging Face folder")
    pack.add_argument("--field", help="name of the text in jsonl and parquet (text)")
    pack.add_argument("--glob", help="which files, with --kind text_tree")
    pack.add_argument("--exclude", nargs="*", help="names of folders to leave out, with --kind text_tree")
    pack.add_argument("--on-bad-file", choices=["skip", "refuse"])
    pack.add_argument("--shard-tokens", type=int, default=SHARD_TOKENS, help="tokens of a shard, about")
    verify = commands.add_parser("verify", help="compare every shard with its checksum")
    verify.add_argument("out", type=Path)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        if options.command == "verify":
            store = TokenStore(options.out)
            store.verify()
            print(f"{options.out}: {len(store)} documents, {store.facts['tokens']} tokens, whole")
        else:
            _pack(options)
    except (ConfigError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _pack(options: argparse.Namespace) -> None:
    if options.out.exists():
        raise ConfigError("OUT", str(options.out), "exists", "name a new folder")
    if options.shard_tokens < 1:
        raise ConfigError("--shard-tokens", options.shard_tokens, "must be at least 1")
    names = ("kind", "path", "field", "glob", "exclude", "on_bad_file")
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    try:
        source = KINDS[options.kind](**given)
    except ValidationError as error:
        fault = error.errors()[0]
        raise ConfigError(f"--{fault['loc'][-1]}", fault["input"], fault["msg"]) from None
    tokenizer = load_tokenizer(options.tokenizer)
    tokenise(source, tokenizer, options.out, shard_tokens=options.shard_tokens)


if __name__ == "__main__":
    sys.exit(main())
