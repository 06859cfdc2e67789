import json
import sysconfig
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from ltrain.config.base import ConfigError
from ltrain.config.data import Jsonl, Parquet, TextTree
from ltrain.data.sources import source_files, texts
from ltrain.data.sources.record import BadRecord


def read(source):
    return [text for _, text in texts(source, source_files(source))]


def test_text_tree_reads_every_text_file_in_order_of_its_path(tmp_path: Path) -> None:
    for name in ("b/x.txt", "a/y.md", "a.txt", "a/__pycache__/z.txt", ".git/config", "a/tests/t.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read(TextTree(path=tmp_path)) == ["a/tests/t.txt", "a/y.md", "a.txt", "b/x.txt"]
    assert read(TextTree(path=tmp_path, exclude=("tests",))) == ["a/y.md", "a.txt", "b/x.txt"]
    assert read(TextTree(path=tmp_path, glob="*.txt")) == ["a.txt"]


def test_stdlib_is_the_running_pythons_own_source() -> None:
    root = Path(sysconfig.get_paths()["stdlib"])
    names = [p.relative_to(root).as_posix() for p in source_files(TextTree(path="stdlib"))]
    assert "json/decoder.py" in names and "argparse.py" in names
    assert all(name.endswith(".py") for name in names)
    assert not any("site-packages" in name or "__pycache__" in name for name in names)
    without = source_files(TextTree(path="stdlib", exclude=("test", "tests")))
    assert 100 < len(without) < len(names)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "is empty"),
        (b" \n\t", "is empty"),
        (b"ok \xff", "is not UTF-8 at offset 3"),
        (b"a\0b", "is not text: byte 0 at offset 1"),
    ],
)
def test_text_tree_says_what_is_wrong_with_a_file(tmp_path: Path, data: bytes, reason: str) -> None:
    (tmp_path / "x.txt").write_bytes(data)
    (bad,) = read(TextTree(path=tmp_path))
    assert isinstance(bad, BadRecord) and bad == reason


def test_jsonl(tmp_path: Path) -> None:
    lines = [
        json.dumps({"text": "first\nline"}),
        "",
        "{broken",
        json.dumps({"other": 1}),
        json.dumps({"text": 3}),
        json.dumps({"text": ""}),
        '{"text": "\\ud800"}',
        "[1]",
        json.dumps({"text": "last", "body": "body"}),
    ]
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(lines))
    found = list(texts(Jsonl(path=tmp_path), [file]))
    assert [t for _, t in found if not isinstance(t, BadRecord)] == ["first\nline", "last"]
    assert {name.rpartition(":")[2]: t for name, t in found if isinstance(t, BadRecord)} == {
        "3": "is not valid JSON",
        "4": "has no field 'text'",
        "5": "holds no text",
        "6": "is empty",
        "7": "has half a surrogate pair at character 0",
        "8": "has no field 'text'",
    }
    assert [t for t in read(Jsonl(path=file, field="body")) if not isinstance(t, BadRecord)] == ["body"]


def test_parquet(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    table = pyarrow.table({"text": ["one", None, "two"], "n": [1, 2, 3]})
    pyarrow.parquet.write_table(table, file)
    assert read(Parquet(path=tmp_path)) == ["one", "holds no text", "two"]
    assert read(Parquet(path=file, field="n")) == ["holds no text"] * 3
    with pytest.raises(ConfigError, match=r"data\.sources\.field='body' must be a column.*text, n"):
        read(Parquet(path=file, field="body"))


def test_damaged_parquet_is_a_bad_record(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one"] * 1000}), file)
    file.write_bytes(file.read_bytes()[:-20])
    (bad,) = read(Parquet(path=file))
    assert isinstance(bad, BadRecord) and "is not readable Parquet" in bad


@pytest.mark.parametrize(
    "source",
    [
        TextTree(path="nowhere"),
        Jsonl(path="nowhere"),
        Parquet(path="nowhere"),
    ],
)
def test_a_path_that_does_not_exist_is_refused(source) -> None:
    with pytest.raises(ConfigError, match=r"data\.sources\.path='nowhere' does not exist"):
        source_files(source)


def test_a_folder_without_matching_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no file that matches"):
        source_files(Jsonl(path=tmp_path))
    with pytest.raises(ConfigError, match="is no pattern"):
        source_files(TextTree(path=tmp_path, glob="/etc/*"))
    (tmp_path / "x").write_text("x")
    with pytest.raises(ConfigError, match="must be a folder"):
        source_files(TextTree(path=tmp_path / "x"))
