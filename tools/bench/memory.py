"""Memory levels: bytes saved by one layer, time of a step against `none`, peak memory of a process.

    python tools/bench/memory.py bytes                      # Llama-2-7B's and Llama-3-8B's layer, bf16
    python tools/bench/memory.py elimination                # Llama-2-7B's layer with token elimination, bf16
    python tools/bench/memory.py time --tokens 4096         # medians of interleaved steps, two threads
    python tools/bench/memory.py peak --tokens 16384        # one process a level, resident memory

`bytes` and `elimination` build one real layer of the shape and run few tokens through it: what is saved a
token doesn't depend on their number. Prints a Markdown table; `--json FILE` keeps the figures.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ltrain.attention import patterns
from ltrain.attention.context import AttentionContext
from ltrain.attention.module import AttentionSettings, CoreAttention
from ltrain.attention.rope import Rope
from ltrain.config.elimination import BlockElimination, RandomScorer
from ltrain.config.model import LoraAdapter
from ltrain.elimination.runtime import Elimination
from ltrain.elimination.scorers import Random
from ltrain.metrics.saved import SavedBytes
from ltrain.model.build import build_model
from ltrain.model.language_model import LanguageModel
from ltrain.model.layer_bytes import saved_bytes
from ltrain.model.memory import LEVELS as ALL_LEVELS
from ltrain.model.spec import ModelSpec
from ltrain.parallel.layout import SequenceLayout
from ltrain.parallel.mesh import Mesh, init_mesh, init_process_group
from ltrain.parallel.seam import cpu_seam, device, on_cpu

LEVELS = ALL_LEVELS[:-1] if on_cpu() else ALL_LEVELS  # offload needs a GPU
LORA = LoraAdapter(rank=8, alpha=16, targets=("qkv", "o"))
HF_LORA = 48.2  # h-bytes of Hugging Face LoRA on q, k, v, o, from the logs of arXiv 2501.09767's artifact
SHAPES = {
    "Llama-2-7B": {"hidden": 4096, "heads": 32, "kv_heads": 32, "ffn": 11008},
    "Llama-3-8B": {"hidden": 4096, "heads": 32, "kv_heads": 8, "ffn": 14336},
}


def make_spec(
    hidden: int, heads: int, kv_heads: int, ffn: int, layers: int = 1, vocab: int = 256
) -> ModelSpec:
    rope = Rope({"rope_type": "default", "rope_theta": 1e4}, hidden // heads, 1 << 20, 1 << 20)
    return ModelSpec(
        family="llama", hidden_size=hidden, num_layers=layers, num_heads=heads, num_kv_heads=kv_heads,
        head_dim=hidden // heads, ffn_hidden_size=ffn, vocab_size=vocab, norm_eps=1e-5, tie_embeddings=True,
        qkv_bias=False, o_bias=False, qk_norm=False, windows=(None,) * layers, rope=rope,
    )  # fmt: skip


def make_model(
    spec: ModelSpec,
    level: str,
    dtype: torch.dtype,
    lora: LoraAdapter | None = None,
    elimination: Elimination | None = None,
) -> LanguageModel:
    """A model with random weights; with `lora` only the adapters are trained."""
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    settings = AttentionSettings(
        rope=spec.rope, windows=spec.windows, pattern=patterns.dense(), total_kv_heads=spec.num_kv_heads
    )
    with cpu_seam():
        model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    model = build_model(
        spec, core_attention=partial(CoreAttention, settings=settings), model_class=LanguageModel,
        real_vocab_size=spec.vocab_size, memory_level=level, dtype=dtype, lora=lora,
        elimination=elimination,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0) if "norm" in name else parameter.normal_(std=0.02)
            parameter.requires_grad_(lora is None or "lora_" in name)
    return model.to(device())


def make_context(mesh: Mesh, tokens: int, block: int = 128) -> AttentionContext:
    return AttentionContext(
        qkv_format="sbhd",
        layout=SequenceLayout("striped", tokens, 1, block),
        group=mesh.context.group,
        rope_positions=torch.arange(tokens, dtype=torch.int32, device=device()),
    )


def bench_bytes(args: argparse.Namespace, mesh: Mesh) -> list[dict[str, Any]]:
    found = []
    for shape, sizes in SHAPES.items():
        spec = make_spec(**sizes)
        for level in LEVELS:
            for tuning, lora in (("full", None), ("LoRA", LORA)):
                layer = make_model(spec, level, torch.bfloat16, lora).decoder.layers[0]
                context = make_context(mesh, args.tokens)
                context.rope_tables = spec.rope.tables(context.rope_positions)
                x = torch.randn(args.tokens, 1, spec.hidden_size, dtype=torch.bfloat16, device=device())
                with SavedBytes([*layer.parameters(), *context.rope_tables]) as saved:
                    y, _ = layer(x.requires_grad_(), packed_seq_params=context)
                formula = saved_bytes(spec, level, 2, adapter=lora, fused_norm=not on_cpu())
                measured = saved.total / args.tokens / spec.hidden_size
                row = {
                    "shape": shape, "tuning": tuning, "level": level, "hooks": round(measured, 2),
                    "formula": round(formula.total / spec.hidden_size, 2),
                    "HF LoRA over it": round(HF_LORA / measured, 2) if shape == "Llama-2-7B" else "",
                }  # fmt: skip
                found.append(row)
                print(row, file=sys.stderr, flush=True)
                del layer, x, y, saved
    return found


def bench_elimination(args: argparse.Namespace, mesh: Mesh) -> list[dict[str, Any]]:
    """Bytes saved a token over the hidden size, by hooks, beside the formula's, where 0.7 of the blocks are
    kept."""
    spec, kept, block = make_spec(**SHAPES["Llama-2-7B"]), 0.7, args.tokens // 20
    found = []
    for level in LEVELS:
        row: dict[str, Any] = {"level": level}
        for mode in (None, "qkv", "backward", "layer", "q"):
            chosen = None
            if mode is not None:
                config = BlockElimination(ratio=kept, mode=mode, strata=2, block=block, scorer=RandomScorer())
                chosen = Elimination(config, (kept,), Random(), block=block, steps=1, seed=0)
            layer = make_model(spec, level, torch.bfloat16, elimination=chosen).decoder.layers[0].train()
            context = make_context(mesh, 20 * block, block)
            context.rope_tables = spec.rope.tables(context.rope_positions)
            x = torch.randn(20 * block, 1, spec.hidden_size, dtype=torch.bfloat16, device=device())
            with SavedBytes([*layer.parameters(), *context.rope_tables]) as saved:
                y, _ = layer(x.requires_grad_(), packed_seq_params=context)
            share = context.eliminated[0][0] if mode else 1.0
            said = saved_bytes(spec, level, 2, kept=share, mode=mode or "qkv", fused_norm=not on_cpu())
            hooks, formula = saved.total / len(x) / spec.hidden_size, said.total / spec.hidden_size
            row[mode or "dense"] = f"{hooks:.1f} ({formula:.1f})"
            del layer, x, y, saved
        found.append(row)
        print(row, file=sys.stderr, flush=True)
    return found


def bench_time(args: argparse.Namespace, mesh: Mesh) -> list[dict[str, Any]]:
    spec = make_spec(args.hidden, args.hidden // 64, args.hidden // 256, args.hidden * 11 // 4, args.layers)
    runs: dict[str, list[float]] = {level: [] for level in LEVELS}
    models = {level: make_model(spec, level, torch.float32) for level in LEVELS}
    tokens = torch.randint(0, 256, (1, args.tokens), device=device())
    for step in range(args.steps + 1):
        for level, model in models.items():
            model.zero_grad()
            context = make_context(mesh, args.tokens)
            began = time.perf_counter()
            output = model(
                input_ids=tokens,
                position_ids=None,
                attention_mask=None,
                labels=tokens,
                packed_seq_params=context,
            )
            output[0].backward()
            if not on_cpu():
                torch.cuda.synchronize()
            if step:  # the first one warms up
                runs[level].append(time.perf_counter() - began)
    medians = {level: statistics.median(seconds) for level, seconds in runs.items()}
    facts = {"tokens": args.tokens, "hidden": args.hidden, "layers": args.layers}
    return [
        {**facts, "level": level, "median s": round(m, 3), "over none": round(m / medians["none"], 3)}
        for level, m in medians.items()
    ]


def bench_peak(args: argparse.Namespace) -> list[dict[str, Any]]:
    found = []
    for level in LEVELS:
        command = [sys.executable, "-W", "ignore", __file__, "peak", "--level", level]
        for name in ("tokens", "hidden", "layers"):
            command += [f"--{name}", str(getattr(args, name))]
        line = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
        found.append(json.loads(line))
    return found


def one_peak(args: argparse.Namespace, mesh: Mesh) -> None:
    """Resident memory of this process before a step, between forward and backward, and at its peak."""
    import psutil

    spec = make_spec(args.hidden, args.hidden // 64, args.hidden // 256, args.hidden * 11 // 4, args.layers)
    model = make_model(spec, args.level, torch.float32)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    tokens = torch.randint(0, 256, (1, args.tokens), device=device())
    process = psutil.Process()
    before = process.memory_info().rss
    output = model(
        input_ids=tokens,
        position_ids=None,
        attention_mask=None,
        labels=tokens,
        packed_seq_params=make_context(mesh, args.tokens),
    )
    between = process.memory_info().rss
    output[0].backward()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    saved = saved_bytes(spec, args.level, 4, fused_norm=False).total * args.tokens * args.layers
    row = {"tokens": args.tokens, "hidden": args.hidden, "layers": args.layers, "level": args.level}
    row |= {
        name: round(value / 2**30, 3)
        for name, value in (
            ("saved GiB by formula", saved),
            ("after forward GiB", between - before),
            ("peak GiB", peak - before),
        )
    }
    print(json.dumps(row))


def table(rows: list[dict[str, Any]]) -> str:
    head = list(rows[0])
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(str(row[name]) for name in head) + " |" for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("bytes", "elimination", "time", "peak"))
    parser.add_argument("--tokens", type=int, default=None)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--level", choices=LEVELS, help="of one process of `peak`; all of them without")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.tokens = args.tokens or {"bytes": 64, "elimination": 160, "time": 4096, "peak": 16384}[args.part]
    if args.part == "peak" and args.level is None:
        rows = bench_peak(args)
    else:
        init_process_group(600)
        mesh = init_mesh()
        if args.part == "peak":
            one_peak(args, mesh)
            return
        bench = {"bytes": bench_bytes, "elimination": bench_elimination, "time": bench_time}[args.part]
        rows = bench(args, mesh)
    print(table(rows))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
