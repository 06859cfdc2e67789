"""Patterns as token masks from their definitions, and a model that recomputes everything under them.

Patterns with weights of their own are recomputed by `support.learned_recomputation`.
"""

from __future__ import annotations

import torch
from transformers import AttentionInterface, AutoModelForCausalLM

from ltrain.attention import patterns
from support.learned_recomputation import gate_mask, nsa_attention, stored_weights


def static_mask(config, length, block, layer, num_layers, heads):
    """Bool [heads, T, T] of a static pattern, before causality; heads are key/value heads."""
    row, col = torch.arange(length)[:, None] // block, torch.arange(length)[None] // block
    kind = config["kind"]
    full = torch.ones(heads, length, length, dtype=torch.bool)
    if kind == "dense" or layer in config.get("dense_layers", ()):
        return full
    if kind == "longgen":
        if num_layers // 3 <= layer < num_layers - num_layers // 3:
            return full
        return static_mask(config["sparse"], length, block, layer, num_layers, heads)
    if kind == "sliding_window":
        near = row - col < -(-(config["window"] - 1) // block) + 1
        return (near | (col < -(-config["sinks"] // block))).expand(heads, -1, -1)
    assert kind == "s2"
    stride = config["stride"]
    step = max(1, stride // heads)
    masks = []
    for head in range(heads):
        strided = (col + head * step + config.get("head_offset", 0)) % stride == 0
        masks.append((row - col < config["local_blocks"]) | strided)
        if head >= heads - config.get("dense_heads", 0):
            masks[-1] = full[0]
    return torch.stack(masks)


def dynamic_mask(config, q, k, block, phases, layer, num_layers):
    """Bool [Hq, T, T] of a dynamic pattern, before causality. q [1, T, Hq, D], k [1, T, Hkv, D].

    `phases` are (start, stop, is a prompt); the first is a prompt that the pattern itself serves.
    """
    pattern = patterns.KINDS[config["kind"]](**{n: v for n, v in config.items() if n != "kind"})
    length, heads, kv_heads = q.shape[1], q.shape[2], k.shape[2]
    mask = torch.zeros(heads, length, length, dtype=torch.bool)
    if pattern.is_dense_layer(layer, num_layers):
        return ~mask
    first = phases[0][1]
    arguments = {"num_kv_heads": kv_heads, "num_heads": heads, "block": block}
    apart = pattern.model_copy(update={"verticals": "tokens"}) if config["kind"] == "vertical_slash" else None
    for begin, stop, prompt in phases:
        if begin == 0:
            chosen = pattern.index(num_tokens=first, q=q[:, :first], k=k[:, :first], **arguments)
            blocks = chosen.to_mask()[0].repeat_interleave(block, 1).repeat_interleave(block, 2)
            selected = blocks[:, :first, :first]
            if config.get("verticals") == "tokens":
                found = apart.select(num_tokens=first, q=q[:, :first], k=k[:, :first], **arguments)
                blocks = found.index.to_mask()[0].repeat_interleave(block, 1).repeat_interleave(block, 2)
                selected = blocks[:, :first, :first] | found.verticals.mask[0][:, None]
            mask[:, :first, :first] = selected.repeat_interleave(heads // len(selected), 0)
        if prompt and apart is not None:
            watched = apart.model_copy(
                update={"observed": min(apart.observed, stop - begin), **({"anchors": 1} if begin else {})}
            )
            found = watched.select(num_tokens=stop, q=q[:, :stop], k=k[:, :stop], **arguments)
            last = found.index.to_mask()[0, :, -1]
            diagonals = [{last.shape[1] - 1 - c for c in row.nonzero()[:, 0].tolist()} for row in last]
            keys = found.verticals.mask[0]
            whole = stop <= pattern.dense_below
        for i in range(max(begin, first), stop):
            row = i // block
            for head in range(heads):
                if config["kind"] == "xattention":
                    mask[head, i] = True
                elif config["kind"] == "block_topk":
                    mask[head, i] = _gate(pattern, q, k, head, i, block)
                else:
                    unit = head * len(diagonals) // heads
                    near = -(-(pattern.window - 1) // block) + 1
                    for j in range(i + 1):
                        distance = row - j // block
                        inside = (
                            j
                            if pattern.verticals == "tokens"
                            else slice(j - j % block, j - j % block + block)
                        )
                        seen = j < keys.shape[1] and bool(keys[unit, inside].any())
                        mask[head, i, j] = whole or distance in diagonals[unit] or distance < near or seen
    return mask


def _gate(pattern, q, k, head, i, block):
    """MoBA's gate of one token: bool [T]."""
    length, heads, kv_heads = q.shape[1], q.shape[2], k.shape[2]
    group, row = heads // kv_heads, i // block
    kv = head // group
    queries = q[0, i, kv * group : (kv + 1) * group].sum(0) if pattern.heads == "kv" else q[0, i, head]
    scores = {c: float(queries @ k[0, c * block : (c + 1) * block, kv].mean(0)) for c in range(row)}
    chosen = {row, *range(min(pattern.sink_blocks, row))}
    others = sorted((c for c in scores if c not in chosen), key=lambda c: (-scores[c], c))
    chosen |= set(others[: max(0, min(pattern.top_k, row + 1) - len(chosen))])
    return torch.tensor([j // block in chosen for j in range(length)])


def _attend(module, query, key, value, attention_mask, *, scaling, masks, windows, branches, **unused):
    layer = module.layer_idx
    group = query.shape[1] // key.shape[1]
    if branches is not None and layer in branches[1]:
        rows = (x[0].transpose(0, 1) for x in (query, key, value))
        return nsa_attention(*branches, layer, *rows, window=windows[layer], scale=scaling)[None], None
    mask = masks(layer, query.transpose(1, 2), key.transpose(1, 2))
    length = query.shape[2]
    at = torch.arange(length)
    mask = mask & (at[None] <= at[:, None])
    if windows[layer] is not None:
        mask = mask & (at[:, None] - at[None] < windows[layer])
    scores = query @ key.repeat_interleave(group, 1).transpose(2, 3) * scaling
    weights = scores.masked_fill(~mask[None], -torch.inf).softmax(-1)
    return (weights @ value.repeat_interleave(group, 1)).transpose(1, 2), None


def recomputed_logits(folder, spec, config, block, tokens, phases):
    """Logits fp64 [T, V] of one full forward under the masks."""
    AttentionInterface.register("recomputation", _attend)
    model = AutoModelForCausalLM.from_pretrained(folder).double().eval()
    model.set_attn_implementation("recomputation")
    weights = stored_weights(folder) if config["kind"] in ("seer_gate", "nsa") else {}
    branches = (config, weights, block, phases) if config["kind"] == "nsa" else None

    def masks(layer, q, k):
        if config["kind"] in ("dense", "sliding_window", "s2", "longgen"):
            mask = static_mask(config, q.shape[1], block, layer, spec.num_layers, k.shape[2])
            return mask.repeat_interleave(q.shape[2] // k.shape[2], 0)
        if config["kind"] == "seer_gate" and layer in weights:
            return gate_mask(config, weights[layer], q.float(), k.float(), block, phases)
        return dynamic_mask(config, q.float(), k.float(), block, phases, layer, spec.num_layers)

    with torch.no_grad():
        return model(
            torch.tensor([tokens]), use_cache=False, masks=masks, windows=spec.windows, branches=branches
        ).logits[0]
