"""`ltrain generate`: continuations and the cache's size; wrong input is named, with exit code 2."""

import json
import re
import shutil

import pytest
from support.learned_recomputation import save_learned
from support.models import save_tiny

from ltrain.cli import main
from ltrain.data.tokenizer import byte_tokenizer
from ltrain.model.attention_file import NAME, parse_attention
from ltrain.model.pattern_weights import FACTS, WEIGHTS

SPARSE = {"pattern": {"kind": "s2", "local_blocks": 1, "stride": 4}, "block": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = save_tiny(
        tmp_path_factory.mktemp("model") / "tiny", "llama", vocab_size=258, max_position_embeddings=256
    )
    byte_tokenizer().save(made)
    (made / NAME).write_text(json.dumps(parse_attention(SPARSE, "test").file()))
    return made


def test_prompts_are_continued_from_a_small_cache(folder, tmp_path, capsys):
    (tmp_path / "prompt.txt").write_text("a long prompt " * 14)
    arguments = ["generate", str(folder), "--prompt", "one", "--prompt-file", str(tmp_path / "prompt.txt")]
    arguments += ["--max-tokens", "5", "--device", "cpu"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "one|" in out and "prompt |" in out
    kind, share = re.search(r"^(\w+): .* dense .* MiB \(([\d.]+)%\)$", out, re.MULTILINE).groups()
    assert kind == "s2" and 20 < float(share) < 60
    assert main([*arguments, "--attention", "dense"]) == 0
    assert re.search(r"^dense: ", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ([], "must name texts"),
        (["--prompt", ""], "must name texts"),
        (["--prompt", "x", "--max-tokens", "0"], "must be at least 1"),
        (["--prompt", "x", "--max-tokens", "300"], "max_position_embeddings=256"),
        (["--prompt", "x", "--attention", "{kind: s2, block: 2}"], "--attention: pattern.s2.block"),
        (["--prompt", "x", "--attention", "[1]"], "must be trained, dense or a pattern"),
        (["--prompt-file", "/no/such/file"], "cannot be read"),
    ],
)
def test_wrong_input_is_named(folder, capsys, arguments, rule):
    assert main(["generate", str(folder), *arguments]) == 2
    assert rule in capsys.readouterr().err


NSA = {"kind": "nsa", "top_k": 2, "compress": 4, "window": 12, "initial_gates": [0.5, 0.5, 0.5]}


def test_a_pattern_runs_with_its_own_weights_and_no_others(folder, tmp_path, capsys):
    learned = save_learned(folder, tmp_path / "nsa", NSA, 8)

    def generate(model, *options):
        arguments = ["generate", str(model), "--prompt", "one two", "--max-tokens", "2", "--device", "cpu"]
        return main([*arguments, *options]), capsys.readouterr()

    code, said = generate(learned)
    assert code == 0 and re.search(r"^nsa: 2 tokens", said.out, re.MULTILINE)
    code, said = generate(folder, "--attention", "{kind: nsa, compress: 4}")
    assert code == 2
    assert "--attention='nsa' has weights of its own" in said.err and "is not there; copy it" in said.err
    code, said = generate(learned, "--attention", "{kind: seer_gate}")
    assert code == 2 and "holds those of nsa; use nsa or dense" in said.err
    code, said = generate(learned, "--attention", "{kind: nsa, compress: 2}")
    assert (
        code == 2 and "key_weight with shape (2, 4), the pattern has (2, 2); take the pattern of" in said.err
    )
    other = save_tiny(
        tmp_path / "other", "llama", vocab_size=258, max_position_embeddings=256, num_hidden_layers=3
    )
    byte_tokenizer().save(other)
    for name in (NAME, FACTS, WEIGHTS):
        shutil.copy(learned / name, other)
    code, said = generate(other)
    assert code == 2 and "model.layers.2.self_attn.nsa" in said.err
    (learned / WEIGHTS).write_bytes(b"not tensors")
    code, said = generate(learned)
    assert code == 2 and "can't be read" in said.err
    assert generate(learned, "--attention", "dense")[0] == 0
    everywhere = "{kind: nsa, dense_layers: [0, 1]}"
    assert generate(folder, "--attention", everywhere)[0] == 0, "no layer has weights of its own"


def test_a_folder_that_is_no_model_is_named(tmp_path, capsys):
    assert main(["generate", str(tmp_path / "absent"), "--prompt", "x"]) == 2
    assert "there is no such folder" in capsys.readouterr().err
