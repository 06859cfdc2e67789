"""Every metric of a run: its name, unit, meaning and reduction over ranks. Names are an API."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Reduction = Literal["sum", "mean", "max", "last"]


@dataclass(frozen=True)
class Metric:
    name: str
    unit: str
    reduction: Reduction
    meaning: str


def _table(text: str) -> dict[str, Metric]:
    metrics = {}
    for line in text.strip().splitlines():
        name, unit, reduction, meaning = (part.strip() for part in line.split("|"))
        metrics[name] = Metric(name, unit, reduction, meaning)  # type: ignore[arg-type]
    return metrics


METRICS = _table(
    """
    train/loss | nats/token | last | mean next-token loss over the step's target tokens
    train/ppl | 1 | last | exp of the loss
    train/grad_norm | 1 | last | global gradient norm before clipping
    train/lr | 1 | last | learning rate
    train/tokens | tokens | last | tokens seen since the start
    train/target_tokens | tokens | last | target tokens of the step
    train/skipped_steps | steps | last | steps skipped since the start because a gradient was not finite
    train/rollbacks | steps | last | returns to a checkpoint because of a loss spike
    perf/tokens_per_s | tokens/s | last | tokens over the step's wall time, all devices
    perf/tokens_per_s_per_gpu | tokens/s | last | the same per device
    perf/step_time_s | s | max | wall time of the step
    perf/mfu | 1 | last | dense causal model FLOPs per document over the devices' peak
    perf/tflops_per_gpu | TFLOP/s | last | dense causal model FLOPs per document, a device
    perf/tflops_executed_per_gpu | TFLOP/s | last | FLOPs really executed, recomputation and sparsity counted
    time/data_s | s | max | waiting for the loader
    time/plan_s | s | max | waiting for the plan of a step
    time/forward_backward_s | s | max | forward and backward of all micro-batches, without gradient reduction
    time/forward_s | s | max | forward of all micro-batches, without the wait for other pipeline stages
    time/backward_s | s | max | backward of all micro-batches, without the wait for other pipeline stages
    time/attention_s | s | max | attention inside forward and backward, its exchange included
    time/selection_s | s | max | finding what a sparse pattern attends, and its own loss
    time/attention_comm_s | s | max | waiting for attention's exchange
    time/grad_sync_s | s | max | gradient reduction
    time/optimizer_s | s | max | optimizer step
    time/sync_s | s | max | low-bandwidth outer round
    time/checkpoint_s | s | max | training blocked by checkpoints
    time/evaluation_s | s | max | held-out evaluation since the last record, outside the step
    mem/max_allocated_gib | GiB | max | peak of device memory (host memory without a GPU)
    mem/max_reserved_gib | GiB | max | peak reserved by the caching allocator
    mem/host_gib | GiB | max | resident memory of the process
    mem/alloc_retries | 1 | max | allocation retries
    mem/bytes_per_token_layer | B | last | bytes saved for the backward per token and layer, unsharded
    gpu/utilization | % | mean | utilisation that the driver reports
    gpu/power_w | W | mean | power draw
    gpu/temperature_c | C | max | temperature
    balance/compute_max_over_mean | 1 | last | time in forward and backward, slowest rank over mean
    balance/tokens_max_over_mean | 1 | last | tokens of the fullest rank over mean
    balance/work_max_over_mean | 1 | last | attention work of the busiest rank over mean
    balance/exchange_step_max_over_mean | 1 | max | busiest rank of each exchange step over mean work
    balance/comm_wait_frac | 1 | mean | share of the step spent waiting for the exchange
    balance/lp_predicted_over_measured | 1 | last | planned over measured time of forward and backward
    balance/plan_gap | 1 | last | planned time over its proven lower bound, less 1
    balance/plan_micro_batches | 1 | last | micro-batches of the plan
    balance/slowest_rank | rank | last | rank with the longest time of its own in the step
    balance/straggler_rank | rank | last | rank far slower than the fastest for 60 steps (-1: none)
    comm/bytes_intra_node | B | sum | attention exchange inside nodes, sent
    comm/bytes_inter_node | B | sum | attention exchange between nodes, sent
    sparse/density | 1 | mean | attended share of the causal area
    sparse/pattern_loss | nats | mean | the pattern's own loss (seer_gate), mean over layers
    sparse/selected_mass | 1 | mean | share of the dense attention mass that the pattern keeps
    elim/captured_mass | 1 | mean | share of the score mass in kept blocks
    elim/kept_frac | 1 | mean | kept share of tokens over layers
    sync/bytes_up | B | sum | frames and fetches sent in the outer round, headers of TCP/IP not counted
    sync/bytes_down | B | sum | the same, received
    sync/compression | 1 | last | dense fp32 bytes over bytes sent to each receiver
    sync/receivers | 1 | last | ranks of other replicas that each frame of rank 0 goes to
    sync/outer_steps | rounds | last | outer rounds done
    sync/steps | steps | last | local steps of the next round
    sync/density | 1 | last | share of the entries that this replica sends in the next round
    sync/bits | bits | last | bits of a value in the next round
    sync/drift | 1 | last | norm of the local progress over that of the outer parameters, rank 0's shards
    sync/residual_norm | 1 | last | norm of the error-feedback buffer, rank 0's shards
    sync/round_time_s | s | max | time that the outer round kept training waiting
    sync/wait_s | s | max | of that, waiting for frames of other replicas and the record of the round
    sync/peers | replicas | last | replicas whose contribution is part of the round
    sync/included | 1 | last | 1 if this replica's contribution is
    sync/outer_lr | 1 | last | mean outer rate over tensors
    sync/overlap | replicas | last | mean number of senders of a coordinate that anyone sent
    comm/bytes_stage_links | B | sum | activations and gradients over compressed stage boundaries
    data/pack_fill | 1 | last | share of the rows that holds tokens
    data/pad_frac | 1 | last | share of the rows that is padding
    data/doc_len_p50 | tokens | last | median document length of the step
    data/doc_len_max | tokens | last | longest document of the step
    data/epoch | 1 | last | passes over the documents that are complete
    data/split_documents | 1 | last | documents cut in pieces since the start because they were too long
    data/truncated_tokens | tokens | last | tokens dropped since the start because a document was too long
    eval/loss | nats/token | last | held-out loss
    eval/ppl | 1 | last | exp of the held-out loss
    """
)

# Families whose last part names a layer, a position bucket or a link.
PREFIXES = {
    "eval/targets_pos/": "held-out target tokens that eval/loss_pos of this position is the mean of",
    "eval/loss_pos/": "held-out loss of the tokens up to this position in their document",
    "elim/kept_frac_by_layer/": "kept share of tokens in this layer",
    "sync/bandwidth/": "measured bandwidth of the link from this replica, bytes/s",
    "elim/captured_mass_by_layer/": "share of the score mass in this layer's kept blocks",
    "sparse/density_by_layer/": "attended share of the causal area in this layer",
}


def is_known(name: str) -> bool:
    return name in METRICS or any(name.startswith(prefix) for prefix in PREFIXES)
