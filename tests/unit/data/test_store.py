import errno
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ltrain.config.base import ConfigError
from ltrain.config.data import Jsonl, TextTree, TokenShards
from ltrain.data import tokenise as tokenising
from ltrain.data.store import TokenStore, write_store
from ltrain.data.tokenise import cache_key, open_source, tokenise
from ltrain.data.tokenizer import byte_tokenizer

TEXTS = ["first", "a second document", "third ☃", "4"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Text files of TEXTS."""
    for i, text in enumerate(TEXTS):
        (tmp_path / "text").mkdir(exist_ok=True)
        (tmp_path / "text" / f"{i}.txt").write_text(text)
    return tmp_path / "text"


@pytest.fixture
def packed(folder: Path, tmp_path: Path) -> Path:
    """A store of TEXTS in several shards."""
    tokenise(TextTree(path=folder), byte_tokenizer(), tmp_path / "packed", shard_tokens=12)
    return tmp_path / "packed"


def test_documents_come_back_from_their_shards(packed: Path) -> None:
    store, tokenizer = TokenStore(packed), byte_tokenizer()
    assert len(list(packed.glob("tokens-*.bin"))) == 4
    assert [tokenizer.decode(store[i]) for i in range(len(store))] == TEXTS
    assert store.lengths.tolist() == [len(tokenizer.encode(text)) for text in TEXTS]
    assert store.read(1, 3, 4).tolist() == tokenizer.encode(TEXTS[1])[3:7].tolist()
    assert store[0].dtype == np.int32 and store[0].flags.writeable
    assert store.facts["dtype"] == "uint16" and store.facts["left_out"] == 0
    store.verify()


def test_the_fingerprint_follows_tokens_and_borders(tmp_path: Path) -> None:
    def fingerprint(name: str, *documents: list[int]) -> str:
        pairs = [(7, np.array(d, dtype=np.int32)) for d in documents]
        write_store(tmp_path / name, pairs, byte_tokenizer(), facts={})
        return TokenStore(tmp_path / name).fingerprint

    assert fingerprint("a", [1, 2], [3]) == fingerprint("b", [1, 2], [3])
    assert (
        len({fingerprint("c", [1, 2], [3]), fingerprint("d", [1], [2, 3]), fingerprint("e", [1, 2], [4])})
        == 3
    )


def edit(packed: Path, **changes) -> None:
    facts = json.loads((packed / "facts.json").read_text())
    (packed / "facts.json").write_text(json.dumps({**facts, **changes}))


def cut(path: Path, by: int) -> None:
    os.truncate(path, path.stat().st_size - by)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda p: cut(p / "tokens-00001.bin", 4),
            r"tokens-00001.bin' ends at byte 34 and must end at byte 38",
        ),
        (
            lambda p: cut(p / "tokens-00000.bin", 1),
            r"tokens-00000.bin' ends at byte 13 and must end at byte 14",
        ),
        (lambda p: (p / "tokens-00003.bin").unlink(), r"tokens-00003.bin' ends at byte 0"),
        (lambda p: (p / "facts.json").unlink(), "is not a token store"),
        (lambda p: (p / "facts.json").write_text("{"), "is damaged"),
        (lambda p: (p / "facts.json").write_text("[]"), "is damaged"),
        (lambda p: edit(p, version=1), "has version 1, not 2"),
        (lambda p: edit(p, dtype="object"), "is damaged"),
        (lambda p: edit(p, shards=[]), "counts other shards"),
        (lambda p: cut(p / "offsets.npy", 3), r"offsets.npy' cannot be read"),
        (lambda p: (p / "offsets.npy").write_bytes(pickle.dumps([0, 1])), r"offsets.npy' cannot be read"),
        (lambda p: np.save(p / "offsets.npy", np.zeros(5)), r"offsets.npy' must hold int64"),
        (lambda p: np.save(p / "offsets.npy", np.arange(5)), r"offsets.npy' does not have the checksum"),
    ],
)
def test_a_damaged_store_is_refused_by_file_and_offset(packed: Path, damage, message: str) -> None:
    damage(packed)
    with pytest.raises(ConfigError, match=message):
        TokenStore(packed)


def test_a_shard_outside_the_folder_is_refused(packed: Path) -> None:
    shards = json.loads((packed / "facts.json").read_text())["shards"]
    edit(packed, shards=[{**shards[0], "file": "../secret.bin"}, *shards[1:]])
    with pytest.raises(ConfigError, match="outside the folder"):
        TokenStore(packed)


def test_a_token_outside_the_vocabulary_is_refused_by_file_and_offset(packed: Path) -> None:
    with (packed / "tokens-00001.bin").open("r+b") as file:
        file.seek(6)
        file.write(np.array([60000], dtype="<u2").tobytes())
    store = TokenStore(packed)
    assert len(store[0]) == 7
    with pytest.raises(
        ConfigError, match=r"tokens-00001.bin' holds token 60000 at byte 6; ids must be below 258"
    ):
        store[1]
    with pytest.raises(ConfigError, match="does not have the checksum"):
        store.verify()


@pytest.mark.parametrize("token", [-1, 258])
def test_a_token_outside_the_vocabulary_is_not_written(tmp_path: Path, token: int) -> None:
    with pytest.raises(ConfigError, match="ids must be below 258"):
        write_store(tmp_path / "x", [(0, np.array([token], dtype=np.int32))], byte_tokenizer(), facts={})
    assert list(tmp_path.iterdir()) == []


def test_another_tokenizer_is_refused(packed: Path, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    assert len(open_source(TokenShards(path=packed), tokenizer, tmp_path)) == len(TEXTS)
    tokenizer.fingerprint = "0" * 16
    with pytest.raises(ConfigError, match=r"data\.tokenizer='byte' has fingerprint 0000"):
        open_source(TokenShards(path=packed), tokenizer, tmp_path)


def test_a_source_is_tokenised_once(folder: Path, tmp_path: Path, monkeypatch) -> None:
    tokenizer, source, calls = byte_tokenizer(), TextTree(path=folder), []
    real = tokenising.tokenise
    monkeypatch.setattr(tokenising, "tokenise", lambda *a, **k: calls.append(a) or real(*a, **k))
    first = open_source(source, tokenizer, tmp_path / "cache")
    filtered = source.model_copy(update={"weight": 2.0, "min_tokens": 5, "max_tokens": 9})
    assert open_source(filtered, tokenizer, tmp_path / "cache").folder == first.folder
    assert len(calls) == 1
    (folder / "new.txt").write_text("new")
    assert len(open_source(source, tokenizer, tmp_path / "cache")) == len(TEXTS) + 1
    assert len(calls) == 2


def test_the_cache_key_follows_files_tokenizer_and_what_is_read(folder: Path) -> None:
    tokenizer, source = byte_tokenizer(), TextTree(path=folder)
    keys = [cache_key(source, tokenizer), cache_key(TextTree(path=folder, glob="*.txt"), tokenizer)]
    os.utime(folder / "0.txt", (1, 1))
    keys.append(cache_key(source, tokenizer))
    (folder / "0.txt").rename(folder / "9.txt")
    keys.append(cache_key(source, tokenizer))
    tokenizer.fingerprint = "other"
    keys.append(cache_key(source, tokenizer))
    assert len(set(keys)) == 5
    assert cache_key(source, tokenizer) == keys[-1]


_OPEN = """
import sys
from pathlib import Path
from ltrain.config.data import TextTree
from ltrain.data import tokenise as t
from ltrain.data.tokenizer import byte_tokenizer
real = t.tokenise
def noted(*a, **k):
    print("tokenised")
    return real(*a, **k)
t.tokenise = noted
assert len(t.open_source(TextTree(path=sys.argv[1]), byte_tokenizer(), Path(sys.argv[2]))) == 4
"""


def test_of_two_processes_one_tokenises(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", _OPEN, str(folder), str(tmp_path / "cache")]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sorted(outputs) == ["", "tokenised\n"]


def test_what_a_killed_process_left_is_removed(folder: Path, tmp_path: Path) -> None:
    tokenizer, source = byte_tokenizer(), TextTree(path=folder)
    tokens = tmp_path / "cache" / "tokens"
    left = tokens / f".{cache_key(source, tokenizer)}-0123abcd"
    left.mkdir(parents=True)
    (left / "tokens-00000.bin").write_bytes(b"half")
    open_source(source, tokenizer, tmp_path / "cache")
    assert not left.exists()


def test_a_full_disk_leaves_nothing_behind(folder: Path, tmp_path: Path, monkeypatch) -> None:
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("ltrain.data.store._sync", full)
    with pytest.raises(ConfigError, match=r"data\.cache=.*cannot be written: No space left on device"):
        open_source(TextTree(path=folder), byte_tokenizer(), tmp_path / "cache")
    assert [p.suffix for p in (tmp_path / "cache" / "tokens").iterdir()] == [".lock"]


def test_bad_files_are_counted_or_refused(folder: Path, tmp_path: Path, caplog) -> None:
    (folder / "empty.txt").write_text("")
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    tokenizer = byte_tokenizer()
    with caplog.at_level("WARNING", "ltrain"):
        assert tokenise(TextTree(path=folder), tokenizer, tmp_path / "a")["left_out"] == 2
    assert "latin.txt is not UTF-8 at offset 3" in caplog.text
    with pytest.raises(ConfigError, match=r"empty.txt' is empty; mend or remove it"):
        tokenise(TextTree(path=folder, on_bad_file="refuse"), tokenizer, tmp_path / "b")
    assert not list(tmp_path.glob("*b*"))


def test_a_source_of_bad_records_only_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{}\n{}\n")
    with pytest.raises(ConfigError, match=r"holds no usable document.*'left_out': 2"):
        tokenise(Jsonl(path=tmp_path), byte_tokenizer(), tmp_path / "out")


def pack(*arguments: object) -> subprocess.CompletedProcess:
    tool = Path(__file__).parents[3] / "tools" / "pack_dataset.py"
    return subprocess.run(
        [sys.executable, str(tool), *map(str, arguments)], capture_output=True, text=True, timeout=120
    )


def test_pack_dataset_writes_what_the_tokens_source_reads(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = pack("pack", out, "--kind", "text_tree", "--path", folder, "--shard-tokens", 12)
    assert done.returncode == 0, done.stderr
    store = open_source(TokenShards(path=out), byte_tokenizer(), tmp_path)
    assert [byte_tokenizer().decode(store[i]) for i in range(len(store))] == TEXTS
    assert "4 documents, 40 tokens, whole" in pack("verify", out).stdout
    again = pack("pack", out, "--kind", "text_tree", "--path", folder)
    assert again.returncode == 2 and "exists; name a new folder" in again.stderr


def test_pack_dataset_refuses_bad_input(packed: Path, tmp_path: Path) -> None:
    with (packed / "tokens-00002.bin").open("r+b") as file:
        file.write(b"\x01")
    damaged = pack("verify", packed)
    assert damaged.returncode == 2 and "tokens-00002.bin' does not have the checksum" in damaged.stderr
    wrong = pack("pack", tmp_path / "x", "--kind", "jsonl", "--path", tmp_path, "--glob", "*.txt")
    assert wrong.returncode == 2 and "--glob='*.txt'" in wrong.stderr
