"""The study's table and plot: means over seeds, differences within a seed, the page's marks."""

import json

import pytest

from ltrain.cli import main
from ltrain.report.elimination import BEGIN, END


def _study(folder):
    folder.mkdir()
    for arm, shift in (("dense", 0.0), ("qkv, random", 0.25), ("dense, 768 tokens (equal bytes)", 0.125)):
        for seed in (1, 2):
            row = {
                "arm": arm, "seed": seed, "text_loss": 2.0 + seed + shift, "text_last_quarter_loss": 2.0,
                "recall_loss": 1.0, "recall_accuracy": 0.5, "saved_bytes_per_token_layer": 100.0,
                "tflop": 2.0, "kept_frac": 0.7, "row_tokens": 768 if "768" in arm else 1024,
            }  # fmt: skip
            (folder / f"{arm[:9]}-{len(arm)}-{seed}.json").write_text(json.dumps(row))
    return folder


def test_the_page_gets_table_and_plot(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert main(["report", "--elimination", str(_study(tmp_path / "s")), "--page", str(page)]) == 0
    text = page.read_text()
    assert "old" not in text and text.startswith("before") and text.rstrip().endswith("after")
    assert "| qkv, random | 2 | 3.7500 | +0.2500 (+0.2500 +0.2500) |" in text
    assert "| 0.75 x | 1.00 x |" in text  # a row of 768 tokens saves that many fewer bytes
    assert (tmp_path / "page.png").stat().st_size > 1000
    assert main(["report", "--elimination", str(tmp_path / "s"), "--page", str(page)]) == 0
    assert page.read_text() == text


def test_bad_input_is_named(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main(["report", "--elimination", str(tmp_path / "empty")]) == 2
    assert "holds no results of the arm 'dense'" in capsys.readouterr().err
    page = tmp_path / "page.md"
    page.write_text("no marks")
    assert main(["report", "--elimination", str(_study(tmp_path / "s")), "--page", str(page)]) == 2
    assert "must hold the lines" in capsys.readouterr().err
    assert main(["report"]) == 2
    assert "RUN='(missing)' must be given" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{", '{"arm": "dense"}'])
def test_a_broken_result_is_named(text, tmp_path, capsys):
    folder = _study(tmp_path / "s")
    (folder / "bad.json").write_text(text)
    assert main(["report", "--elimination", str(folder)]) == 2
    assert "bad.json" in capsys.readouterr().err
