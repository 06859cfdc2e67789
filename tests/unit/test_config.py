import pytest

from ltrain.config.base import ConfigError
from ltrain.config.load import Faults, load_config, parse_overrides, parse_yaml, validate

GOOD = """
model:
  {kind: new, hidden_size: 64, num_layers: 2, num_heads: 4, ffn_hidden_size: 128, max_position_embeddings:
  128}
data: {sources: [{kind: text_tree, path: stdlib}]}
train: {seq_len: 256, tokens_per_step: 1024}
optimizer: {kind: adamw, lr: 1e-4}
"""


def _load(tmp_path, text=GOOD, *overrides):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return load_config(path, parse_overrides(list(overrides)))


def test_numbers_with_an_exponent_are_numbers(tmp_path):
    assert _load(tmp_path).optimizer.lr == 1e-4


def test_overrides_reach_nested_fields_and_switch_kinds(tmp_path):
    config = _load(
        tmp_path, GOOD, "--train.steps", "7", "--parallel.context.degree=2", "--schedule", "{kind: constant}"
    )
    assert config.train.steps == 7
    assert config.parallel.context.degree == 2
    assert config.schedule.kind == "constant"


@pytest.mark.parametrize(
    "overrides,says",
    [
        (
            ["--train.sequence_len", "8"],
            "train.sequence_len=8 is not a known field; perhaps you meant train.seq_len",
        ),
        (["--trian.steps", "8"], "perhaps you meant train"),
        (["--optimizer.learning_rate", "1"], "optimizer.learning_rate=1 is not a known field"),
        (
            ["--optimizer.kind", "adamm"],
            "optimizer.kind='adamm' must be one of 'adamw', 'cpu_adam'; perhaps you",
        ),
        (["--train.seq_len", "-4"], "train.seq_len=-4 must be greater than 0"),
        (["--train.dtype", "fp8"], "train.dtype='fp8' must be 'fp32' or 'bf16'"),
        (["--train.tokens_per_step", "1000"], "must be a multiple of train.seq_len=256; use 768 or 1024"),
        (["--parallel.tensor", "3"], "must be a multiple of parallel.tensor=3"),
        (["--parallel.context.node_size", "2"], "must divide parallel.context.degree=1"),
        (
            ["--attention.pattern.kind", "seer_gate", "--elimination.kind", "blocks"],
            "can't be joined with token elimination: its gate would learn the attention among kept tokens",
        ),
        (["--schedule.warmup_steps", "1000"], "must not exceed train.steps=100"),
        (["--optimizer.lr", ".inf"], "optimizer.lr=inf must be"),
        (
            ["--data.sources", "[{kind: text_tree, path: x, globb: y}]"],
            "perhaps you meant data.sources[0].glob",
        ),
    ],
)
def test_bad_values_say_field_value_rule_and_fix(tmp_path, overrides, says):
    with pytest.raises(ConfigError) as caught:
        _load(tmp_path, GOOD, *overrides)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_several_faults_are_all_reported(tmp_path):
    with pytest.raises(Faults) as caught:
        _load(tmp_path, GOOD, "--train.steps", "-1", "--train.sed", "3")
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize(
    "text,says",
    [
        ("train: {steps: 1}\ntrain: {steps: 2}", "stands twice"),
        ("a: &x [1]\nb: *x", "must not use YAML aliases"),
        ("a: !!python/object/apply:os.system ['true']", "not valid YAML"),
        ("a: [1", "not valid YAML"),
        ("{1: 2}", "must be text"),
        ("[" * 3000 + "]" * 3000, "nested too deeply"),
    ],
)
def test_hostile_yaml_is_refused(text, says):
    with pytest.raises(ConfigError, match=says):
        parse_yaml(text, "file")


@pytest.mark.parametrize("arguments", [["steps"], ["--train.steps"]])
def test_malformed_overrides(arguments):
    with pytest.raises(ConfigError):
        parse_overrides(arguments)


def test_missing_sections_are_named():
    with pytest.raises(Faults) as caught:
        validate({})
    assert "model='(missing)' must be given" in str(caught.value)


def test_an_unreadable_file(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "bin.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_config(tmp_path / "bin.yaml")
