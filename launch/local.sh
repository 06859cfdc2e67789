#!/usr/bin/env bash
# Train on this machine: launch/local.sh RANKS CONFIG [--section.field VALUE ...]
# One process a GPU, or a CPU process each with its share of the cores.
set -euo pipefail
if [ $# -lt 2 ]; then
  echo "usage: launch/local.sh RANKS CONFIG [--section.field VALUE ...]" >&2
  exit 2
fi
ranks=$1
shift
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/environment.sh
source "$here/environment.sh"
cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores / ranks > 0 ? cores / ranks : 1))}
exec python "$here/elastic.py" --standalone --nproc-per-node "$ranks" --max-restarts "${MAX_RESTARTS:-3}" \
  --signals-to-handle SIGTERM,SIGINT,SIGUSR1 "$here/train.py" "$@"
