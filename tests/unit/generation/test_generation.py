"""Generation from a sparse cache equals full recomputation under the same pattern, token for token."""

import pytest
import torch
from support.learned_recomputation import save_learned
from support.models import save_tiny
from support.recomputation import recomputed_logits
from transformers import AutoModelForCausalLM

from ltrain.generation.model import SparseModel, greedy
from ltrain.model.attention_file import parse_attention
from ltrain.model.families import read_spec

BLOCK = 8
S2 = {"kind": "s2", "local_blocks": 2, "stride": 4}
WINDOW = {"kind": "sliding_window", "window": 12, "sinks": 3}
SLASH = {
    **{"kind": "vertical_slash", "observed": 8, "window": 4, "sinks": 2, "dense_below": 16},
    **{"vertical_p": 0.3, "slash_p": 0.3, "max_verticals": 3, "max_slashes": 1},
}
PATTERNS = {
    "dense": {"kind": "dense"},
    "window": WINDOW,
    "window-no-sinks": {**WINDOW, "sinks": 0},
    "s2": S2,
    "s2-dense-head": {**S2, "dense_heads": 1, "head_offset": 1},
    "longgen": {"kind": "longgen", "sparse": S2},
    "topk": {"kind": "block_topk", "top_k": 3},
    "topk-query": {"kind": "block_topk", "top_k": 2, "sink_blocks": 0, "heads": "query", "dense_layers": [1]},
    "slash-blocks": SLASH,
    "slash-tokens": {**SLASH, "verticals": "tokens", "heads": "query"},
    "xattention": {"kind": "xattention", "stride": 4, "pool": 2, "threshold": 0.5},
    "gate": {"kind": "seer_gate", "top_k": 3, "gate_dim": 4, "dense_layers": [2]},
    "nsa": {
        **{"kind": "nsa", "top_k": 3, "compress": 4, "window": 12, "local_blocks": 1},
        **{"initial_gates": [0.5, 0.75, 0.25], "dense_layers": [1]},
    },
}
LEARNED = ("gate", "nsa")
LENGTHS = (61, 1, 40, 23)
NEW = 11


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def get(variant, name=None):
        if name in LEARNED and (variant, name) not in made:
            folder = tmp_path_factory.mktemp("learned") / name
            made[variant, name] = save_learned(get(variant), folder, PATTERNS[name], BLOCK)
        if name in LEARNED:
            return made[variant, name]
        if variant not in made:
            made[variant] = save_tiny(
                tmp_path_factory.mktemp("models") / variant, variant, num_hidden_layers=3
            )
        return made[variant]

    return get


def load(folder, config):
    model = AutoModelForCausalLM.from_pretrained(folder)
    return SparseModel(model, read_spec(folder), parse_attention({"pattern": config, "block": BLOCK}, "test"))


def prompts():
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 131, (n,), generator=generator).tolist() for n in LENGTHS]


def forced(model, prompt, rest):
    """Logits [len(rest), V] before each token of `rest`, one token at a time."""
    cache = model.new_cache()
    hidden = model.hidden(torch.tensor([prompt]), [cache], search=True)
    found = [model.logits(hidden[0, -1])]
    for token in rest[:-1]:
        hidden = model.hidden(torch.tensor([[token]]), [cache], search=False)
        found.append(model.logits(hidden[0, -1]))
    return torch.stack(found)


@pytest.mark.parametrize("name", PATTERNS)
def test_a_batch_of_prompts_equals_full_recomputation(folders, name):
    folder = folders("llama", name)
    model = load(folder, PATTERNS[name])
    outputs, caches = greedy(model, prompts(), NEW)
    sparse = False
    for prompt, output, cache in zip(prompts(), outputs, caches, strict=True):
        phases = [(0, len(prompt), True), (len(prompt), len(prompt) + NEW, False)]
        whole = prompt + output
        expected = recomputed_logits(folder, model.spec, PATTERNS[name], BLOCK, whole, phases)
        expected = expected[len(prompt) - 1 : -1]
        assert expected.argmax(-1).tolist() == output
        logits = forced(model, prompt, output)
        torch.testing.assert_close(logits.double(), expected, atol=2e-5, rtol=1e-4)
        assert cache.length == len(whole) - 1
        dense = recomputed_logits(folder, model.spec, {"kind": "dense"}, BLOCK, whole, phases)
        sparse |= not torch.allclose(dense[len(prompt) - 1 : -1], expected, atol=1e-3)
    assert sparse == (name != "dense"), "the pattern must matter"


@pytest.mark.parametrize("variant", ["llama-tied-llama3", "qwen2-window", "qwen3", "mistral-window"])
@pytest.mark.parametrize("name", ["s2", "slash-tokens", "topk", "gate", "nsa"])
def test_families_and_their_own_windows(folders, variant, name):
    folder = folders(variant, name)
    model = load(folder, PATTERNS[name])
    prompt = prompts()[0]
    (output,), _ = greedy(model, [prompt], NEW)
    phases = [(0, len(prompt), True), (len(prompt), len(prompt) + NEW, False)]
    expected = recomputed_logits(folder, model.spec, PATTERNS[name], BLOCK, prompt + output, phases)
    expected = expected[len(prompt) - 1 : -1]
    assert expected.argmax(-1).tolist() == output
    torch.testing.assert_close(forced(model, prompt, output).double(), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", PATTERNS)
def test_a_second_turn_on_a_copied_cache_equals_full_recomputation(folders, name):
    folder = folders("llama", name)
    model = load(folder, PATTERNS[name])
    context, first, second, rest = prompts()[0], prompts()[3][:13], prompts()[2][:5], prompts()[2][5:12]
    cache = model.new_cache()
    model.hidden(torch.tensor([context]), [cache], search=True)
    for question in (first, second):
        turn = cache.copy()
        found = [model.hidden(torch.tensor([question]), [turn], search=True)]
        # Several decoded tokens at once are the same as one after the other.
        found.append(model.hidden(torch.tensor([rest]), [turn], search=False))
        logits = model.logits(torch.cat(found, 1)[0])
        n, m = len(context), len(context) + len(question)
        phases = [(0, n, True), (n, m, True), (m, m + len(rest), False)]
        whole = context + question + rest
        expected = recomputed_logits(folder, model.spec, PATTERNS[name], BLOCK, whole, phases)[n:]
        torch.testing.assert_close(logits.double(), expected, atol=2e-5, rtol=1e-4)
    assert cache.length == len(context)


def test_the_dense_pattern_is_what_transformers_generates(folders):
    folder = folders("qwen3")
    plain = AutoModelForCausalLM.from_pretrained(folder)
    prompt = prompts()[0]
    ids = torch.tensor([prompt])
    expected = plain.generate(
        ids,
        attention_mask=torch.ones_like(ids),  # else token 0 would count as padding
        max_new_tokens=NEW,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )[0, len(prompt) :].tolist()
    model = load(folder, {"kind": "dense"})
    (output,), (cache,) = greedy(model, [prompt], NEW)
    assert output == expected
    end = expected[4]
    (short,), _ = greedy(model, [prompt], NEW, end=end)
    assert short == expected[: expected.index(end)]
    held = plain(torch.tensor([prompt]), use_cache=True).past_key_values
    in_transformers = sum(x.keys.nbytes + x.values.nbytes for x in held.layers)
    assert model.dense_bytes(len(prompt)) == in_transformers
    assert in_transformers < cache.nbytes < 2 * in_transformers


def test_s2_keeps_each_heads_shard_and_a_window_is_a_ring(folders):
    """The blocks in the cache are those that the definition lets the next token see, no more."""
    folder, length = folders("llama"), 203
    tokens = torch.arange(length)[None] % 131
    slot_bytes = 2 * BLOCK * 8 * 4  # keys and values, 8 dims, fp32
    model = load(folder, S2)
    cache = model.new_cache()
    model.hidden(tokens, [cache], search=True)
    row = length // BLOCK
    (table,) = {id(t): t for t in cache.tables.values()}.values()
    widest = 0
    for head in range(2):
        shard = {c for c in range(row + 1) if row - c < 2 or (c + head * 2) % 4 == 0}
        kept = table.cols[0][head]
        assert set(kept[kept >= 0].tolist()) == shard
        widest = max(widest, len(shard))
    assert sum(store.nbytes for store in cache.stores) == 3 * 2 * widest * slot_bytes
    assert cache.nbytes < 0.4 * model.dense_bytes(length)

    window = load(folder, WINDOW)
    cache = window.new_cache()
    window.hidden(tokens[:, :50], [cache], search=True)
    held = []
    for token in range(100):
        window.hidden(tokens[:, token : token + 1], [cache], search=False)
        held.append(sum(store.nbytes for store in cache.stores))
    # The sink, the diagonal and the two blocks before it that hold the 12 nearest tokens.
    assert set(held[8:]) == {3 * 2 * 4 * slot_bytes}


def test_a_dense_head_is_stored_apart_from_the_others(folders):
    model = load(folders("llama"), PATTERNS["s2-dense-head"])
    cache = model.new_cache()
    model.hidden(torch.arange(400)[None] % 131, [cache], search=True)
    (table,) = cache.tables.values()
    assert [group.tolist() for group in table.groups] == [[0], [1]]
    assert table.cols[0].shape[1] < 20 and table.cols[1].shape[1] == 50


def test_an_empty_prompt_is_refused(folders):
    with pytest.raises(ValueError, match="needs a token"):
        greedy(load(folders("llama"), S2), [[]], 2)
