# The body of every job script: run_job CONFIG [...] on all nodes of the job, and the requeue. Sourced, not run.
# shellcheck shell=bash
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# run_job NODES HEAD SRUN_OPTION... -- CONFIG [--section.field VALUE ...]
run_job() {
  local nodes=$1 head=$2 options=()
  shift 2
  while [ "$1" != -- ]; do
    options+=("$1")
    shift
  done
  shift
  # The address that SLURM itself reaches the node by; its name need not resolve.
  local address port=$((15000 + SLURM_JOB_ID % 40000))
  address=$(scontrol show node "$head" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
  # Before SLURM 23.02 a job isn't told its end; ranks leave in time for a last checkpoint.
  if [ -z "${SLURM_JOB_END_TIME:-}" ]; then
    SLURM_JOB_END_TIME=$(date -d "$(squeue -h -j "$SLURM_JOB_ID" -o %e | head -n 1)" +%s || true)
    export SLURM_JOB_END_TIME
  fi
  local marker=${SLURM_SUBMIT_DIR:-.}/.ltrain-$SLURM_JOB_ID.stopped
  rm -f "$marker"

  srun "${options[@]}" --kill-on-bad-exit=1 bash "$root/launch/node.sh" \
    "$nodes" "${address:-$head}:$port" "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" "$@" --run.stop_marker "$marker" &
  local step=$! code=0
  # SLURM signals the batch shell; pass it on, so that every rank saves and leaves a marker.
  trap 'kill -USR1 '"$step"' 2>/dev/null || true' USR1 TERM
  # A signal ends `wait` early: wait again until the step is gone.
  while kill -0 "$step" 2>/dev/null; do
    code=0
    wait "$step" || code=$?
  done

  # srun may report a signal or 1 where ranks stopped on request, so the marker decides, never the code.
  if [ -f "$marker" ]; then
    echo "stopped at step $(cat "$marker"); requeueing"
    rm -f "$marker"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
  fi
  exit "$code"
}
