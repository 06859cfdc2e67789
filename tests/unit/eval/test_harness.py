"""lm-eval on tasks with data of their own: our adapter answers as the harness's own one does."""

import json

import pytest
from support.models import save_tiny

from ltrain.config.base import ConfigError
from ltrain.data.tokenizer import byte_tokenizer
from ltrain.eval.run import EvalSettings, run_eval

pytest.importorskip("lm_eval")

CHOICE = """
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["red", "green", "blue"]
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: brier_score
    aggregation: brier_score
    higher_is_better: false
"""
GENERATE = """
task: local_generate
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{expected}}}}"
generation_kwargs: {{until: ["e"], max_gen_toks: 12, do_sample: false}}
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
ROLLING = """
task: local_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list:
  - metric: byte_perplexity
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = save_tiny(
        tmp_path_factory.mktemp("model") / "tiny", "qwen3", vocab_size=258, max_position_embeddings=512
    )
    byte_tokenizer().save(made)
    return made


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    # The harness lists all installed packages by running pip, which takes longer than the tasks.
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    data = tmp_path / "data.jsonl"
    rows = [
        {"question": f"What colour has number {n}? ", "answer": n % 3, "expected": "red"} for n in range(4)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, text in (("choice", CHOICE), ("generate", GENERATE), ("rolling", ROLLING)):
        (folder / f"{name}.yaml").write_text(text.format(data=data))
    return folder


def test_a_pattern_that_sees_everything_answers_as_the_harness_own_model(folder, tasks, tmp_path):
    names = ["lm_eval:local_choice", "lm_eval:local_generate", "lm_eval:local_rolling"]
    outcomes = {}
    for attention in ("dense", "{kind: s2, local_blocks: 1, stride: 1}", "{kind: sliding_window, window: 2}"):
        settings = EvalSettings(device="cpu", include=tasks, attention=attention, block=8)
        found = run_eval(folder, names, [512], tmp_path / "out", settings)
        outcomes[attention.split()[-1]] = {
            (task, metric): value
            for task, scores in found["lm_eval"]["results"].items()
            for metric, value in scores.items()
            if isinstance(value, float)
        }
    dense, whole, window = outcomes.values()
    assert len(dense) >= 4 and dense == pytest.approx(whole, rel=1e-4)
    key = ("local_rolling", "byte_perplexity,none")
    assert abs(dense[key] - window[key]) > 1e-3 * dense[key]


def test_an_unknown_task_is_named(folder, tmp_path):
    with pytest.raises(ConfigError, match="is no task of lm-eval"):
        run_eval(folder, ["lm_eval:no_such_task"], [512], tmp_path / "out", EvalSettings(device="cpu"))
