#!/usr/bin/env bash
# Train several replicas on this machine, joined by the rendezvous service:
#   launch/replicas.sh CONFIG 'REPLICA [RANKS] [--section.field VALUE ...]' ...
# One argument a replica: its name, its ranks (1), and what differs from CONFIG, for instance
#   launch/replicas.sh configs/sync_three_mixed.yaml a b 'slow 2 --parallel.pipeline 2 \
#     --parallel.stage_links.kind projection --parallel.stage_links.rank 64'
# The address and the token file are those of CONFIG; a missing token is made. Every line says whose it is. Ends
# when all replicas have, with the exit code of the last that failed.
set -euo pipefail
if [ $# -lt 2 ]; then
  echo "usage: launch/replicas.sh CONFIG 'REPLICA [RANKS] [--section.field VALUE ...]' ..." >&2
  exit 2
fi
config=$1
shift
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
names=()
for replica in "$@"; do
  names+=("${replica%% *}")
done
mapfile -t facts < <(python "$here/peers.py" "$config" "${names[0]}" $#)
if [ ${#facts[@]} -ne 2 ]; then
  exit 2
fi
token=${facts[0]} run=${facts[1]}
if [ ! -e "$token" ]; then
  mkdir -p "$(dirname "$token")"
  (umask 077 && head -c 32 /dev/urandom | base64 >"$token")
fi
shared=(--sync.peers.num_replicas $#)
# Cores are shared by all ranks of all replicas.
total=0
for replica in "$@"; do
  read -r -a words <<<"$replica"
  ranks=${words[1]:-1}
  [[ $ranks =~ ^[0-9]+$ ]] || ranks=1
  total=$((total + ranks))
done
cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores / total > 0 ? cores / total : 1))}

python -m ltrain.cli sync-rendezvous "$config" --sync.peers.replica "${names[0]}" "${shared[@]}" &
service=$!
jobs=()
# shellcheck disable=SC2317  # called by traps
stop() {
  kill "$service" ${jobs[@]+"${jobs[@]}"} 2>/dev/null || true
}
trap stop EXIT
trap 'stop; exit 75' INT TERM
for replica in "$@"; do
  read -r -a words <<<"$replica"
  name=${words[0]} ranks=1 rest=("${words[@]:1}")
  if [[ ${words[1]:-} =~ ^[0-9]+$ ]]; then
    ranks=${words[1]} rest=("${words[@]:2}")
  fi
  "$here/local.sh" "$ranks" "$config" --sync.peers.replica "$name" --run.name "$run-$name" "${shared[@]}" \
    ${rest[@]+"${rest[@]}"} > >(sed -u "s/^/$name: /") 2>&1 &
  jobs+=($!)
done
code=0
for job in "${jobs[@]}"; do
  wait "$job" || code=$?
done
exit $code
