"""`ltrain eval` over a folder: files, determinism, refusals; a real model against plain `transformers`."""

import json
import shutil
import sys

import pytest
import torch
from support.learned_recomputation import save_learned
from support.models import save_tiny

from ltrain.cli import main
from ltrain.config.base import ConfigError
from ltrain.data.tokenizer import byte_tokenizer
from ltrain.eval.model import load_model
from ltrain.eval.run import EvalSettings, run_eval
from ltrain.model.attention_file import NAME, parse_attention

SPARSE = {"pattern": {"kind": "s2", "local_blocks": 2, "stride": 2}, "block": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = save_tiny(
        tmp_path_factory.mktemp("model") / "tiny", "llama", vocab_size=258, max_position_embeddings=512
    )
    byte_tokenizer().save(made)
    return made


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    made = tmp_path_factory.mktemp("text")
    for i in range(6):
        (made / f"{i}.txt").write_text(f"document {i} " * (20 + 30 * i))
    return made


@pytest.mark.parametrize("variant", ["llama", "qwen2-window", "mistral-window"])
def test_cached_and_chunked_reading_equals_one_forward(tmp_path, variant):
    made = save_tiny(tmp_path / "m", variant, vocab_size=258, max_position_embeddings=512)
    byte_tokenizer().save(made)
    model = load_model(made, device="cpu")
    model.chunk_tokens = 7
    ids = model.tokens("The quick brown fox jumps over the lazy dog.")
    with torch.no_grad():
        logits = model.model(torch.tensor([ids])).logits[0]
    expected = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none")
    torch.testing.assert_close(model.losses(ids), expected, atol=1e-4, rtol=1e-4)
    kept = model.read(ids[:20])
    first = model.losses(ids[20:], kept.copy())
    again = model.losses(ids[20:], kept.copy())
    assert torch.equal(first, again), "a copy leaves the prefix as it was"
    torch.testing.assert_close(first, expected[19:], atol=1e-4, rtol=1e-4)


def test_generation_equals_that_of_transformers(folder):
    model = load_model(folder, device="cpu")
    ids = model.tokens("def answer")
    expected = model.model.generate(
        torch.tensor([ids]), max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=257
    )[0, len(ids) :].tolist()
    found = model.generate(model.read(ids), 12)
    whole = model.tokenizer.decode(expected)
    assert found == (whole.lstrip().split("\n")[0] if "\n" in whole.lstrip() else whole)


def test_files_and_results_and_that_they_repeat(folder, text, tmp_path):
    settings = EvalSettings(
        samples=1,
        depths=(0.0, 1.0),
        text=text,
        holdout=0.0,
        cache=tmp_path / "cache",
        device="cpu",
        beyond_context=True,
    )
    tasks = ["needle", "niah_single_2", "kv_turns", "perplexity"]
    results = run_eval(folder, tasks, [1088, 1152], tmp_path / "out", settings)
    again = run_eval(folder, tasks, [1088, 1152], tmp_path / "again", settings)
    assert results == again
    stored = json.loads((tmp_path / "out" / "results.json").read_text())
    assert stored["tasks"]["niah_single_2"].keys() == {"1088", "1152"}
    assert len(stored["needle"]["scores"]) == 2 and len(stored["needle"]["scores"][0]) == 2
    assert [entry["window"] for entry in stored["perplexity"]] == [1088, 1152]
    assert len(stored["tasks"]["kv_turns"]["1088"]["score_by_turn"]) == 5
    for name in ("needle.png", "perplexity.png", "tasks.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    lines = (tmp_path / "out" / "samples.jsonl").read_text().splitlines()
    assert len(lines) == 2 * (2 + 1 + 5)
    assert {json.loads(line)["length"] for line in lines} == {1088, 1152}


def test_the_command_prints_tables(folder, text, tmp_path, capsys):
    arguments = ["--tasks", "perplexity", "--lengths", "256", "--text", str(text), "--holdout", "0"]
    arguments += ["--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main(["eval", str(folder), *arguments]) == 0
    assert "Loss by position" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"lengths": [0]}, "--lengths"),
        ({"samples": 0}, "--samples"),
        ({"depths": (2.0,)}, "--depths"),
        ({"holdout": 1.0}, "--holdout"),
        ({"seed": -1}, "--seed"),
        ({"tasks": ["unknown"]}, "is no task"),
        ({"lengths": [100]}, "too short"),
        ({"device": "abacus"}, "is no device"),
        ({"lengths": [512, 513]}, "longer than the model's context, max_position_embeddings=512"),
        ({"attention": "sparse"}, "must be trained, dense or a pattern"),
        ({"attention": "{kind: s3}"}, "--attention: pattern"),
        ({"attention": "{kind: s2, strid: 2}"}, "--attention: pattern.s2.strid"),
        ({"attention": "{kind: nsa}"}, "weights of its own"),
        ({"attention": "{kind: s2, stride: 0}"}, "must be greater than 0"),
        ({"block": 0}, "--attention: block"),
    ],
)
def test_wrong_input_is_named(folder, tmp_path, change, rule):
    tasks, lengths = change.pop("tasks", ["vt"]), change.pop("lengths", [512])
    with pytest.raises(ConfigError, match=rule):
        run_eval(folder, tasks, lengths, tmp_path / "out", EvalSettings(**{"device": "cpu", **change}))


def test_folders_that_are_no_model_are_named(tmp_path, capsys):
    assert main(["eval", str(tmp_path / "absent"), "--lengths", "512"]) == 2
    assert "there is no such folder" in capsys.readouterr().err
    assert main(["eval", str(tmp_path), "--lengths", "512"]) == 2
    assert "has no config.json" in capsys.readouterr().err
    (tmp_path / "config.json").write_text("{}")
    assert main(["eval", str(tmp_path), "--lengths", "512", "--device", "cpu"]) == 2
    assert "cannot be loaded" in capsys.readouterr().err


@pytest.fixture(scope="module")
def sparse_folder(tmp_path_factory):
    made = save_tiny(
        tmp_path_factory.mktemp("sparse") / "tiny", "qwen3", vocab_size=258, max_position_embeddings=2048
    )
    byte_tokenizer().save(made)
    (made / NAME).write_text(json.dumps(parse_attention(SPARSE, "test").file()))
    return made


def test_a_model_runs_with_the_attention_that_it_was_trained_with(sparse_folder, tmp_path, capsys):
    def scores(**change):
        settings = EvalSettings(samples=1, device="cpu", **change)
        return run_eval(sparse_folder, ["kv_turns"], [1024], tmp_path / "out", settings)

    trained, dense = scores(), scores(attention="dense")
    assert trained["attention"] == parse_attention(SPARSE, "test").model_dump(mode="json")
    assert dense["attention"]["pattern"]["kind"] == "dense"
    cells = [found["tasks"]["kv_turns"][1024] for found in (trained, dense)]
    assert cells[0]["reference_loss"] != pytest.approx(cells[1]["reference_loss"], abs=1e-3)
    assert cells[0]["cache"]["bytes"] < 0.7 * cells[0]["cache"]["dense_bytes"]
    assert cells[1]["cache"]["bytes"] == cells[1]["cache"]["dense_bytes"]
    # An S2 of one shard that holds all blocks is dense attention.
    whole = scores(attention="{kind: s2, local_blocks: 1, stride: 1}")["tasks"]["kv_turns"][1024]
    assert whole["reference_loss"] == pytest.approx(cells[1]["reference_loss"], abs=1e-5)


@pytest.mark.parametrize("kind", ["s2", "vertical_slash", "block_topk", "nsa"])
def test_losses_of_a_sparse_model_do_not_depend_on_how_they_are_computed(sparse_folder, tmp_path, kind):
    pattern = {**SPARSE["pattern"], "kind": kind} if kind == "s2" else {"kind": kind}
    if kind == "nsa":
        pattern = {"kind": kind, "top_k": 2, "compress": 4, "window": 20, "initial_gates": [0.5, 0.5, 0.5]}
        sparse_folder = save_learned(sparse_folder, tmp_path / "nsa", pattern, 16)
    attention = parse_attention({"pattern": pattern, "block": 16}, "test")
    model = load_model(sparse_folder, device="cpu", attention=attention)
    ids = model.tokens("The quick brown fox jumps over the lazy dog. " * 4)
    whole = model.losses(ids)
    model.chunk_tokens = 7
    assert torch.equal(model.losses(ids), whole), "chunks are of logits only"
    prefix = model.read(ids[:100])
    after = model.losses(ids[100:120], prefix.copy())
    one_by_one = []
    for token in ids[100:120]:
        one_by_one.append(float(-prefix.logits.log_softmax(-1)[token]))
        prefix = model.step(token, prefix)
    torch.testing.assert_close(after, torch.tensor(one_by_one), atol=1e-5, rtol=1e-5)
    if kind == "s2":
        torch.testing.assert_close(after, whole[99:119], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("{", "cannot be read"),
        ("[]", "must have schema 1"),
        ('{"schema": 2}', "it has 2"),
        ('{"schema": 1, "attention": {"pattern": {"kind": "s2", "stride": -1}}}', "must be greater than 0"),
        ('{"schema": 1, "attention": {"pattern": {"kind": "block_topk"}, "blocks": 3}}', "blocks"),
    ],
)
def test_a_damaged_attention_file_is_named(folder, tmp_path, text, rule):
    made = tmp_path / "model"
    shutil.copytree(folder, made)
    (made / NAME).write_text(text)
    with pytest.raises(ConfigError, match=rule) as raised:
        run_eval(made, ["vt"], [512], tmp_path / "out", EvalSettings(device="cpu"))
    assert NAME in str(raised.value)


def test_without_lm_eval_the_error_says_how_to_get_it(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match="needs lm-eval") as raised:
        run_eval(folder, ["lm_eval:ruler"], [512], tmp_path / "out", EvalSettings(device="cpu"))
    assert "pip install" in raised.value.fix
