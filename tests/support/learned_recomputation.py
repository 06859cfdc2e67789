"""`seer_gate` and `nsa` from their definitions over a whole sequence in fp64, with a folder's weights.

The blocks of a first prompt are those that the pattern finds in it; a later token's are found here.
"""

from __future__ import annotations

import json
import shutil

import torch
from safetensors.torch import load_file

from ltrain.attention import patterns
from ltrain.model.attention_file import NAME, parse_attention
from ltrain.model.families import read_spec
from ltrain.model.pattern_weights import WEIGHTS, PatternFiles, pattern_shapes
from ltrain.model.sharding import Piece, Shard


def save_learned(source, folder, config, block, seed=7):
    """A copy of a model's folder with random weights of the pattern `config` beside the model."""
    shutil.copytree(source, folder)
    attention = parse_attention({"pattern": config, "block": block}, "test")
    (folder / NAME).write_text(json.dumps(attention.file()))
    spec, pattern = read_spec(folder), patterns.from_config(attention.pattern)
    files = PatternFiles(folder, spec, pattern, block, torch.float32)
    generator = torch.Generator().manual_seed(seed)
    for name, shape in pattern_shapes(spec, pattern).items():
        values = torch.randn(shape, generator=generator) * 0.5
        files.files.add(Shard(shape, (Piece(name, 0, 0, shape[0], 0),)), values)
    files.finish()
    return folder


def stored_weights(folder):
    """By layer, then by name, in fp64."""
    found = {}
    for name, tensor in load_file(folder / WEIGHTS).items():
        _, _, layer, _, _, parameter = name.split(".")
        found.setdefault(int(layer), {})[parameter] = tensor.double()
    return found


def _best(scores, forced, count):
    """The forced columns and the best others, `count` in all; earlier ones at ties."""
    others = sorted((c for c in range(len(scores)) if c not in forced), key=lambda c: (-float(scores[c]), c))
    return forced | set(others[: max(0, count - len(forced))])


def _prompt_blocks(config, weights, q, k, block, first):
    """Bool [Hkv, first, first]: what the pattern selects in the first prompt."""
    pattern = patterns.KINDS[config["kind"]](**{n: v for n, v in config.items() if n != "kind"})
    module = pattern.make_module(num_heads=q.shape[1], num_kv_heads=k.shape[1], head_dim=q.shape[2])
    module.load_state_dict({name: value.float() for name, value in weights.items()})
    index = pattern.index(
        num_tokens=first, num_heads=q.shape[1], num_kv_heads=k.shape[1], block=block, module=module,
        q=q[None, :first].float(), k=k[None, :first].float(),
    )  # fmt: skip
    wide = index.to_mask()[0].repeat_interleave(block, 1).repeat_interleave(block, 2)
    return wide[:, :first, :first]


def gate_mask(config, weights, q, k, block, phases):
    """Bool [Hq, T, T] of `seer_gate` in a layer, before causality; q [1, T, Hq, D], k [1, T, Hkv, D]."""
    q, k = q[0].double(), k[0].double()
    length, heads, first = len(q), k.shape[1], phases[0][1]
    mask = torch.zeros(heads, length, length, dtype=torch.bool)
    mask[:, :first, :first] = _prompt_blocks(config, weights, q, k, block, first)
    for i in range(first, length):
        row = i // block
        for head in range(heads):
            group = q.shape[1] // heads
            mean = q[i, head * group : (head + 1) * group].mean(0)
            asked = torch.cat([mean, mean, mean]) @ weights["query"][head]
            scores = []
            for c in range(row):
                keys = k[c * block : (c + 1) * block, head]
                pooled = torch.cat([keys.mean(0), keys.amax(0), keys.amin(0)])
                scores.append(asked @ (pooled @ weights["key"][head]))
            forced = {row, *range(min(config.get("sink_blocks", 1), row))}
            chosen = _best([*scores, 0.0], forced, config["top_k"])
            mask[head, i] = torch.tensor([j // block in chosen for j in range(length)])
    return mask.repeat_interleave(q.shape[1] // heads, 0)


def nsa_attention(config, weights, block, phases, layer, q, k, v, *, window, scale):
    """Gated sum of the branches [T, Hq, D] of q [T, Hq, D], k and v [T, Hkv, D]."""
    weights = weights[layer]
    length, heads, run, first = len(q), k.shape[1], config["compress"], phases[0][1]
    group, whole = q.shape[1] // heads, length // run
    far_k, far_v = (
        torch.einsum("nrhd,hr->nhd", x[: whole * run].unflatten(0, (whole, run)), weights[name].softmax(-1))
        for x, name in ((k, "key_weight"), (v, "value_weight"))
    )
    token, end = torch.arange(length), torch.arange(1, whole + 1) * run - 1
    selected = torch.zeros(heads, length, length, dtype=torch.bool)
    selected[:, :first, :first] = _prompt_blocks(config, weights, q, k, block, first)
    for i in range(first, length):
        row = i // block
        nearest = range(max(0, row - config.get("local_blocks", 2) + 1), row + 1)
        forced = {*range(min(config.get("sink_blocks", 1), row)), *nearest}
        for head in range(heads):
            earlier = far_k[: row * block // run, head]
            scores = q[i, head * group : (head + 1) * group] @ earlier.T * q.shape[-1] ** -0.5
            share = scores.softmax(-1).sum(0).unflatten(0, (row, block // run)).sum(-1) if row else []
            chosen = _best([*share, 0.0], forced, config["top_k"])
            selected[head, i] = torch.tensor([j // block in chosen for j in range(length)])
    rows = token // block
    near = rows[:, None] - rows[None] <= -(-(config["window"] - 1) // block)

    def attend(keys, values, places, mask):
        distance = token[:, None] - places[None]
        mask = mask & (distance >= 0) & (distance < (window or length))
        scores = torch.einsum("thd,shd->hts", q, keys.repeat_interleave(group, 1)) * scale
        share = scores.masked_fill(~mask.repeat_interleave(group, 0), -torch.inf).softmax(-1).nan_to_num(0.0)
        return torch.einsum("hts,shd->thd", share, values.repeat_interleave(group, 1))

    parts = (
        attend(far_k, far_v, end, torch.ones(heads, length, whole, dtype=torch.bool)),
        attend(k, v, token, selected),
        attend(k, v, token, near.expand(heads, -1, -1)),
    )
    gates = torch.einsum("thd,hdg->thg", q, weights["gate_weight"]).tanh()
    gates = gates + torch.tensor(config.get("initial_gates", (0.0, 1.0, 0.0)), dtype=q.dtype)
    return sum(gates[..., i, None] * part for i, part in enumerate(parts))
