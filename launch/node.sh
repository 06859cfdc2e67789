#!/usr/bin/env bash
# The processes of one node of a job: launch/node.sh NODES HOST:PORT JOB CONFIG [--section.field VALUE ...]
# srun starts one of these a node; the first node to come to HOST holds the rendezvous.
set -euo pipefail
if [ $# -lt 4 ]; then
  echo "usage: launch/node.sh NODES HOST:PORT JOB CONFIG [--section.field VALUE ...]" >&2
  exit 2
fi
nodes=$1 endpoint=$2 job=$3
shift 3
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/environment.sh
source "$here/environment.sh"
# One process a GPU of this node: the nodes of a job may differ.
ranks=${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
cores=${SLURM_CPUS_PER_TASK:-$(nproc)}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores / ranks > 0 ? cores / ranks : 1))}
exec python "$here/elastic.py" --nnodes "$nodes" --nproc-per-node "$ranks" --max-restarts "${MAX_RESTARTS:-3}" \
  --rdzv-backend c10d --rdzv-endpoint "$endpoint" --rdzv-id "$job" \
  --signals-to-handle SIGTERM,SIGINT,SIGUSR1 "$here/train.py" "$@"
