# Environment of every launch, a reason a line. Sourced, not run.
# shellcheck shell=bash

# torch 2.13 shares the launcher's store over restarts; new workers then read the addresses of dead ones.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# mcore overlaps tensor-parallel collectives with GEMMs only when kernels are issued in order.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
# Long sequences of different lengths fragment the allocator otherwise.
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
# A failed collective ends the process instead of hanging it.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1
# Keep the last collectives of each rank, so that a hang can be read from the dump.
export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000}
# Warnings of NCCL say which link failed; more is noise.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# Forked loader processes and threaded tokenizers don't mix.
export TOKENIZERS_PARALLELISM=false
