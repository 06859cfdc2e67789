"""Next-token loss without the logits: chunks of tokens, vocabulary sharded over tensor-parallel ranks.

Logits of one chunk exist at a time. Where gradients are wanted, those of the hidden states and of the output
weight are computed in the same pass (the loss is a sum, so its gradient is known up to one factor), hence
each chunk's logits are computed once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# T tokens, E hidden size, V vocabulary entries of this tensor-parallel rank.

IGNORE = -100


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TE: Tensor,
        weight_VE: Tensor,
        labels_T: Tensor,
        vocab_start: int,
        vocab_size: int,
        group: dist.ProcessGroup | None,
        chunk: int,
        z_loss: float,
        need_hidden: bool,
        need_weight: bool,
    ) -> tuple[Tensor, Tensor]:
        num_tokens = hidden_TE.shape[0]
        nll_T = torch.zeros(num_tokens, dtype=torch.float32, device=hidden_TE.device)
        total = torch.zeros((), dtype=torch.float32, device=hidden_TE.device)
        grad_hidden_TE = torch.empty_like(hidden_TE) if need_hidden else None
        # fp32: the sum over chunks must not lose small contributions.
        grad_weight_VE = torch.zeros_like(weight_VE, dtype=torch.float32) if need_weight else None
        real = max(0, min(weight_VE.shape[0], vocab_size - vocab_start))
        for start in range(0, num_tokens, chunk):
            rows = slice(start, min(start + chunk, num_tokens))
            h = hidden_TE[rows]
            logits = torch.matmul(h, weight_VE.t()).float()
            logits[:, real:] = float("-inf")  # padding of the vocabulary
            labels = labels_T[rows]
            kept = labels != IGNORE
            local = labels - vocab_start
            mine = kept & (local >= 0) & (local < real)
            at = local.clamp(0, max(real - 1, 0)).unsqueeze(1)

            peak = logits.amax(dim=1)
            if group is not None:
                dist.all_reduce(peak, dist.ReduceOp.MAX, group=group)
            target = logits.gather(1, at).squeeze(1).masked_fill(~mine, 0.0)
            probability = logits.sub_(peak.unsqueeze(1)).exp_()
            sums = torch.stack((probability.sum(dim=1), target))
            if group is not None:
                dist.all_reduce(sums, group=group)
            log_z = sums[0].log() + peak
            nll = (log_z - sums[1]).masked_fill(~kept, 0.0)
            nll_T[rows] = nll
            total += nll.sum()
            if z_loss:
                total += z_loss * log_z.square().masked_fill(~kept, 0.0).sum()
            if not (need_hidden or need_weight):
                continue
            # d nll / d logits = softmax - onehot; d z / d logits = 2 z_loss log_z softmax.
            factor = 1.0 + 2.0 * z_loss * log_z if z_loss else torch.ones_like(log_z)
            probability.mul_((factor / sums[0]).masked_fill(~kept, 0.0).unsqueeze(1))
            probability.scatter_add_(1, at, -mine.unsqueeze(1).to(probability.dtype))
            grad_logits = probability.to(weight_VE.dtype)
            if grad_hidden_TE is not None:
                torch.matmul(grad_logits, weight_VE, out=grad_hidden_TE[rows])
            if grad_weight_VE is not None:
                if h.dtype == torch.float32:
                    grad_weight_VE.addmm_(grad_logits.t(), h)
                else:
                    grad_weight_VE += grad_logits.t() @ h
        if grad_weight_VE is not None:
            grad_weight_VE = grad_weight_VE.to(weight_VE.dtype)
        ctx.save_for_backward(grad_hidden_TE, grad_weight_VE)
        ctx.mark_non_differentiable(nll_T)
        return total, nll_T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        grad_hidden_TE, grad_weight_VE = ctx.saved_tensors
        factor = grads[0]
        if grad_hidden_TE is not None:
            grad_hidden_TE = grad_hidden_TE * factor.to(grad_hidden_TE.dtype)
        if grad_weight_VE is not None:
            grad_weight_VE = grad_weight_VE * factor.to(grad_weight_VE.dtype)
        return grad_hidden_TE, grad_weight_VE, *([None] * 8)


def chunked_cross_entropy(
    hidden_TE: Tensor,
    weight_VE: Tensor,
    labels_T: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    chunk: int = 1024,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The summed next-token loss, and each token's.

    `hidden_TE` [T, E] are final hidden states; `weight_VE` [V, E] is this rank's part of the output weight,
    whose first row is vocabulary entry `vocab_start`; `labels_T` int64 [T] hold global vocabulary entries,
    -100 where there is no target. `vocab_size` is the size of the real vocabulary: rows beyond it are
    padding. Over a tensor-parallel `group` the gradient of `hidden_TE` is this rank's part only and must be
    summed by the caller (mcore's region copy does so).

    Returns the sum over tokens (fp32, differentiable, plus the z-loss where asked for) and the tokens'
    negative log-likelihoods [T] (fp32, constant; 0 where there is no target). All-ignored and empty shards
    give 0 and zero gradients.
    """
    need = torch.is_grad_enabled()
    return _ChunkedCrossEntropy.apply(  # type: ignore[no-any-return]
        hidden_TE,
        weight_VE,
        labels_T,
        vocab_start,
        vocab_start + weight_VE.shape[0] if vocab_size is None else vocab_size,
        group,
        chunk,
        z_loss,
        need and hidden_TE.requires_grad,
        need and weight_VE.requires_grad,
    )
