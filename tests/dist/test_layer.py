"""Memory levels on two ranks: the stock layer's gradients, and no attention traffic in recomputation."""

import pytest
from support.distributed import run_ranks
from support.lean import GATE, NSA
from support.models import save_tiny

SLASH = {
    **{"observed": 8, "window": 16, "sinks": 2, "dense_below": 0, "verticals": "tokens"},
    **{"vertical_p": 0.2, "slash_p": 0.2, "max_verticals": 4, "max_slashes": 2},
}
# name: degrees, options of the model, pattern (of one document unless it is learned)
CASES = {
    "tp2": ({"tensor": 2}, {}, None),
    "tp2-sequence": ({"tensor": 2}, {"sequence_parallel": True}, None),
    "tp2-sequence-lora": (
        {"tensor": 2},
        {"sequence_parallel": True, "adapter": ("qkv", "o", "gate_up", "down")},
        None,
    ),
    "tp2-lora": ({"tensor": 2}, {"adapter": ("qkv", "o", "gate_up", "down")}, None),
    "cp2-ring": ({"context": 2}, {}, None),
    "cp2-ulysses": ({"context": 2}, {"schedule": "ulysses"}, None),
    "cp2-vertical-slash": ({"context": 2}, {}, ("vertical_slash", SLASH)),
    "cp2-nsa": ({"context": 2}, {}, ("nsa", NSA)),
    "cp2-gate": ({"context": 2}, {}, ("seer_gate", GATE)),
    "tp2-sequence-nsa": ({"tensor": 2}, {"sequence_parallel": True}, ("nsa", NSA)),
    "tp2-gate": ({"tensor": 2}, {}, ("seer_gate", GATE)),
}
EXCHANGES = (
    "all_gather_into_tensor",
    "all_to_all_single",
    "batch_isend_irecv",
    "all_reduce",
    "all_gather_object",
    "reduce_scatter_tensor",
    "broadcast",
)


class _Watch:
    """Counts attention's payload bytes, selections, lessons and kernel calls; and any collective while a layer
    recomputes."""

    def __init__(self):
        import torch.distributed as dist

        from ltrain.attention import learned, module
        from ltrain.parallel.collectives import Channel
        from ltrain_kernels.block_sparse import api

        self.reset()
        self.collectives = 0
        self._inside = False
        attend, count, select = module.CoreAttention.attend, Channel._count, module.select_distributed
        lesson, kernel = learned.lesson_distributed, api._forward

        def watched_attend(core, *args, saved=None, **kwargs):
            self._inside = saved is not None
            self.recomputed += self._inside
            try:
                return attend(core, *args, saved=saved, **kwargs)
            finally:
                self._inside = False

        def watched_count(channel, traffic, peer, num_bytes):
            self.bytes += num_bytes * (peer != channel.me)
            return count(channel, traffic, peer, num_bytes)

        def watched_select(*args, **kwargs):
            self.selections += 1
            return select(*args, **kwargs)

        def watched_lesson(*args, **kwargs):
            self.lessons += 1
            return lesson(*args, **kwargs)

        def watched_kernel(*args, **kwargs):
            self.kernels += 1
            return kernel(*args, **kwargs)

        module.CoreAttention.attend, Channel._count = watched_attend, watched_count
        module.select_distributed = watched_select
        learned.lesson_distributed, api._forward = watched_lesson, watched_kernel
        for name in EXCHANGES:
            setattr(dist, name, self._counted(getattr(dist, name)))

    def reset(self):
        self.bytes = self.selections = self.lessons = self.kernels = self.recomputed = 0

    def _counted(self, function):
        def counted(*args, **kwargs):
            self.collectives += self._inside
            return function(*args, **kwargs)

        return counted


def _compare(rank, world_size, folder, variant):
    from support.lean import batch, build_lean, run

    from ltrain.attention import patterns
    from ltrain.model.families import read_spec
    from ltrain.parallel.mesh import init_mesh

    watch, spec, outcome = _Watch(), read_spec(folder), {}
    for name, (degrees, options, pattern) in CASES.items():
        mesh = init_mesh(**degrees)
        for level in ("none", "norms", "mlp", "full"):
            kind, fields = pattern or ("dense", {})
            chosen = patterns.KINDS[kind](**fields)
            model = build_lean(folder, spec, mesh, level, pattern=chosen, **options)
            watch.reset()
            tokens, labels, context = batch(mesh, documents=None if kind == "vertical_slash" else (33, 1, 46))
            loss = run(model, tokens, labels, context)
            forward_bytes, watch.bytes = watch.bytes, 0
            loss.backward()
            grads = {n: p.grad.numpy().copy() for n, p in model.named_parameters() if p.grad is not None}
            counts = (forward_bytes, watch.bytes, watch.selections, watch.lessons, watch.kernels)
            outcome[name, level] = (loss.item(), grads, counts, watch.recomputed)
    return outcome, watch.collectives


@pytest.mark.parametrize("variant", ["qwen3"])
def test_levels_agree_and_attention_is_not_repeated(variant, tmp_path):
    import numpy as np

    folder = save_tiny(tmp_path / "model", variant)
    for outcome, collectives in run_ranks(_compare, 2, folder, variant):
        assert collectives == 0, "a recomputation of attention asked another rank"
        for (name, level), (loss, grads, counts, recomputed) in outcome.items():
            want_loss, want, want_counts, _ = outcome[name, "none"]
            label = f"{name} {level}"
            assert abs(loss - want_loss) <= 1e-12 * abs(want_loss), label
            assert grads.keys() == want.keys(), label
            for parameter, gradient in grads.items():
                error = np.linalg.norm(gradient - want[parameter]) / np.linalg.norm(want[parameter])
                assert error <= 1e-10, f"{label}: {parameter} differs by {error:.1e}"
            assert recomputed == (0 if level == "none" else 2), label
            if name != "cp2-ulysses":  # which keeps its exchanged copies at level none and fetches them here
                assert counts == want_counts, label
            assert counts[0] == want_counts[0] and counts[2:] == want_counts[2:], label
            if kind := next((kind for kind in ("nsa", "gate") if name.endswith(kind)), None):
                assert counts[3] == 2, "once a layer"
                learned = [gradient for parameter, gradient in grads.items() if ".learned." in parameter]
                assert len(learned) == 2 * (3 if kind == "nsa" else 2) and all(abs(g).max() > 0 for g in learned)
            assert (counts[0] > 0) == name.startswith("cp2"), label
