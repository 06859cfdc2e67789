"""For launch/replicas.sh: print the token file and the run's name of a checked configuration, a line each."""

import sys
from pathlib import Path

from ltrain.config.base import ConfigError
from ltrain.config.load import load_config


def main() -> int:
    config_path, replica, num_replicas = sys.argv[1:]
    overrides = {"sync.peers.replica": replica, "sync.peers.num_replicas": int(num_replicas)}
    try:
        config = load_config(Path(config_path), overrides)
        if config.sync.peers is None:
            raise ConfigError("sync.peers", None, "must be given for several replicas", "say where they meet")
    except ConfigError as error:
        print(f"ltrain: {error}", file=sys.stderr)
        return 2
    print(config.sync.peers.token_file)
    print(config.run.name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
