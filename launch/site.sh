#!/usr/bin/env bash
# Start one replica, or one worker of it, on this machine of a site, without a scheduler:
#   launch/site.sh REPLICA CONFIG [--section.field VALUE ...]
# A replica over several machines, such as a pipeline of two slow workers, runs this on each of them with
#   WORKERS=2 WORKER=0|1 HEAD=address:port of worker 0
# RANKS is the number of processes on this machine (its GPUs, or 1). CONFIG says where the replicas meet; the
# rendezvous service runs wherever that address is: ltrain sync-rendezvous CONFIG.
set -euo pipefail
if [ $# -lt 2 ]; then
  echo "usage: [WORKERS=N WORKER=I HEAD=HOST:PORT] launch/site.sh REPLICA CONFIG [--section.field VALUE ...]" >&2
  exit 2
fi
replica=$1 config=$2
shift 2
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/environment.sh
source "$here/environment.sh"
workers=${WORKERS:-1}
if [ "$workers" -gt 1 ] && [ -z "${HEAD:-}" ]; then
  echo "launch/site.sh: HEAD=HOST:PORT of worker 0 is needed with WORKERS=$workers" >&2
  exit 2
fi
if [ -z "${RANKS:-}" ]; then
  RANKS=$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')
fi
if [ "$workers" -gt 1 ]; then
  meet=(--nnodes "$workers" --node-rank "${WORKER:?0 on the head, 1, 2, ... elsewhere}"
    --rdzv-backend c10d --rdzv-endpoint "$HEAD" --rdzv-id "ltrain-$replica")
else
  meet=(--standalone)
fi
exec python -m torch.distributed.run "${meet[@]}" --nproc-per-node "$RANKS" --max-restarts "${MAX_RESTARTS:-3}" \
  --signals-to-handle SIGTERM,SIGINT,SIGUSR1 "$here/train.py" "$config" \
  --sync.peers.replica "$replica" --run.name "$replica" "$@"
