"""The page: self-contained, only panels with data, colours by role, the same bytes from the same input."""

import re
from html.parser import HTMLParser

import pytest
from support.runs import write_evaluation, write_run

from ltrain.cli import main
from ltrain.config.base import ConfigError
from ltrain.report import write
from ltrain.report.figures import phase_stack, running_mean
from ltrain.report.panels import PANELS, Lines
from ltrain.report.runs import read_run
from ltrain.report.theme import PLACEHOLDERS
from ltrain.report.write import write_report

VOID = {"meta", "br", "link", "img"}


class Page(HTMLParser):
    """Checks that elements nest, and collects ids, references and headings."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.headings: list[str] = []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        values = dict(attrs)
        self.ids += [values["id"]] if "id" in values else []
        self.links += [v for k, v in attrs if k in ("href", "src", "xlink:href", "clip-path") and v]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = write_run(tmp_path_factory.mktemp("runs") / "one", steps=12)
    path, _ = write_report([folder])
    return folder, path.read_text()


def test_the_page_needs_nothing_but_itself(report):
    _, text = report
    page = Page(text)
    assert len(page.ids) == len(set(page.ids))
    for link in page.links:
        target = link.removeprefix("url(").removesuffix(")")
        assert target.startswith("#") and target[1:] in page.ids, link
    assert "@import" not in text and "<script" not in text
    assert "prefers-color-scheme: dark" in text


def test_every_colour_of_a_drawing_is_a_variable_of_the_page(report):
    _, text = report
    drawings = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert not re.findall(r"(?:fill|stroke): #[0-9a-f]{6}", drawings)
    for role in set(re.findall(r"var\(--([\w-]+)\)", drawings)):
        assert role in PLACEHOLDERS.roles()
        assert text.count(f"--{role}: #") == 2, "defined for light and for dark"


def test_only_panels_with_data_are_there_and_each_has_a_picture(report):
    folder, text = report
    headings = Page(text).headings
    assert "Held-out loss by position" in headings
    assert "Loss over tokens" in headings
    assert "Attention sparsity" not in headings and "Model FLOPs utilisation" not in headings
    drawn = {panel.key for panel in PANELS if panel.title in headings}
    assert {file.stem for file in (folder / "report").glob("*.png")} == drawn
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in (folder / "report").glob("*.png"))


@pytest.fixture
def few_panels(monkeypatch):
    monkeypatch.setattr(write, "PANELS", PANELS[:2])


def test_the_same_run_gives_the_same_page(report, few_panels):
    folder, _ = report
    text = write_report([folder])[0].read_text()
    path, _ = write_report([folder])
    assert path.read_text() == text


def test_several_runs_share_a_page_and_names_are_escaped(tmp_path):
    first = write_run(tmp_path / "a<b>&", steps=6, extras=True)
    second = write_run(tmp_path / "second", steps=6, seed=1, extras=True)
    path, tables = write_report([first, second], tmp_path / "out")
    text = path.read_text()
    headings = Page(text).headings
    missing = {panel.title for panel in PANELS} - set(headings)
    assert not missing
    assert "<b>" not in text and "a&lt;b&gt;&amp;" in text
    assert [table.title for table in tables][-1] == "Runs"
    assert not (first / "report.html").exists()


def test_runs_of_one_name_are_told_apart_and_a_folder_named_twice_is_refused(tmp_path, few_panels):
    folders = [write_run(tmp_path / where / "run", steps=3) for where in "xy"]
    _, tables = write_report(folders)
    assert tables[-1].heads == ("", "x/run", "y/run")
    with pytest.raises(ConfigError, match="twice"):
        write_report([folders[0], folders[0]])


def test_the_command_prints_the_tables_and_refuses_bad_folders(tmp_path, capsys, few_panels):
    folder = write_run(tmp_path / "run", steps=3)
    assert main(["report", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "2,048 to 4,095" in printed and "beyond the base model's context" in printed
    assert "report.html" in printed
    assert main(["report", str(tmp_path / "none")]) == 2
    assert "is not a folder" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["report", str(folder), "--out", str(tmp_path / "file")]) == 2
    assert main(["report", str(folder), "--unknown", "1"]) == 2


def test_phases_leave_the_first_step_out_and_split_attention_from_the_rest(tmp_path):
    run = read_run(write_run(tmp_path / "run", steps=5, extras=True))
    tokens, parts = phase_stack(run)
    assert tokens == [run.tokens(step) for step in range(2, 6)]
    record = run.training[1]
    inside = parts["rest of forward, backward"][0] + parts["attention"][0] + parts["attention exchange"][0]
    assert inside == pytest.approx(record["time/forward_backward_s"])
    assert all(value >= 0 for values in parts.values() for value in values)


def test_a_long_run_is_averaged_to_few_points(tmp_path):
    run = read_run(write_run(tmp_path / "run", steps=1000))
    tokens, parts = phase_stack(run)
    assert len(tokens) <= 300
    whole = [r["time/forward_backward_s"] for r in run.training[1:]]
    width = -(-len(whole) // 300)
    assert parts["forward, backward"][0] == pytest.approx(sum(whole[:width]) / width)


def test_running_mean():
    assert running_mean([1.0, 3.0, 5.0, 7.0], 2) == [1.0, 2.0, 4.0, 6.0]


def test_panel_keys_and_metrics_are_known():
    from ltrain.metrics.names import is_known

    assert len({panel.key for panel in PANELS}) == len(PANELS)
    for panel in PANELS:
        for name, _ in (*panel.metrics, *panel.markers) if isinstance(panel, Lines) else ():
            assert is_known(name), name


def test_evaluations_in_a_runs_folder_join_its_report(tmp_path):
    folder = write_run(tmp_path / "run", steps=4)
    plain = write_report([folder])[1]
    write_evaluation(folder / "hf-eval")
    path, tables = write_report([folder])
    added = {table.title: table for table in tables[len(plain) :]}
    scores = added["hf-eval: Score (loss of the reference answer)"]
    assert scores.heads == ("task", "1,024", "4,096", "8,192")
    assert scores.rows[1] == ("niah_multivalue", "0.80 (0.60)", "0.70 (0.90)", "0.60 (1.20)")
    assert added["hf-eval: Needle: score (loss of the reference answer)"].rows[2][0] == "100 %"
    assert added["hf-eval: Loss by position, nats a token"].rows[-1] == ("all", "2.0000", "1.9000", "1.8000")
    caches = added["hf-eval: Key/value cache after the question, over a dense one's"]
    assert caches.rows[0] == ("niah_single_1", "0.2 MiB, 25.0%", "1.0 MiB, 25.0%", "2.0 MiB, 25.0%")
    assert added["hf-eval: lm-eval: ruler"].rows == (("acc,none", "0.5000"),)
    page = Page(path.read_text())
    for title in ("Needle retrieved", "Score by task and length"):
        assert f"hf-eval: {title}" in page.headings
    assert len(page.ids) == len(set(page.ids))
    assert all(link.strip("url()").startswith("#") for link in page.links), "pictures are vectors"


def test_a_damaged_evaluation_is_named(tmp_path):
    folder = write_run(tmp_path / "run", steps=4)
    results = write_evaluation(folder / "eval") / "results.json"
    for text, rule in (("{", "cannot be read"), ('{"schema": 1}', "is of schema 1")):
        results.write_text(text)
        with pytest.raises(ConfigError, match=rule):
            write_report([folder])
