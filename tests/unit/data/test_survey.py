"""What `ltrain check` says of the data, against what tokenising it gives."""

import json

import pytest

from ltrain.config.base import ConfigError
from ltrain.config.data import DataConfig
from ltrain.data import survey as module
from ltrain.data.survey import survey
from ltrain.data.tokenise import open_source
from ltrain.data.tokenizer import byte_tokenizer


def _config(tmp_path, **source):
    return DataConfig.model_validate({"sources": [source], "cache": str(tmp_path / "cache")})


def _tree(tmp_path, documents=40):
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(documents):
        (folder / f"{i:03d}.txt").write_text(f"line {i}\n" * (5 + i))
    return folder


def test_small_sources_are_counted_exactly_before_and_after_tokenising(tmp_path):
    folder = _tree(tmp_path)
    (folder / "empty.txt").touch()
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    config, tokenizer = _config(tmp_path, kind="text_tree", path=str(folder)), byte_tokenizer()
    (found,) = survey(config, tokenizer)
    assert found.exact and found.files == 42 and len(found.bad) == 2
    assert "empty.txt is empty" in found.describe() and "is not UTF-8 at offset 3" in found.describe()
    assert not (tmp_path / "cache").exists(), "a check tokenises nothing for good"
    store = open_source(config.sources[0], tokenizer, config.cache)
    assert (found.documents, found.tokens) == (len(store), store.facts["tokens"])
    (again,) = survey(config, tokenizer)
    assert (again.documents, again.tokens) == (found.documents, found.tokens)


@pytest.mark.parametrize("kind", ["text_tree", "jsonl"])
def test_large_sources_are_estimated_from_a_sample(tmp_path, monkeypatch, kind):
    folder = _tree(tmp_path)
    if kind == "jsonl":
        records = [json.dumps({"text": path.read_text()}) for path in sorted(folder.iterdir())]
        folder = tmp_path / "records.jsonl"
        folder.write_text("\n".join(records))
    config, tokenizer = _config(tmp_path, kind=kind, path=str(folder)), byte_tokenizer()
    exact = survey(config, tokenizer)[0]
    monkeypatch.setattr(module, "READ_BYTES", 2000)
    monkeypatch.setattr(module, "TOKENISE_BYTES", 1000)
    (found,) = survey(config, tokenizer)
    assert not found.exact and found.read < 0.7 and "about" in found.describe()
    assert abs(found.tokens / exact.tokens - 1) < 0.35


def test_a_damaged_store_is_found_by_its_checksum(tmp_path):
    folder = _tree(tmp_path)
    config, tokenizer = _config(tmp_path, kind="text_tree", path=str(folder)), byte_tokenizer()
    store = open_source(config.sources[0], tokenizer, config.cache).folder
    shard = store / "tokens-00000.bin"
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ConfigError, match="does not have the checksum"):
        survey(_config(tmp_path, kind="tokens", path=str(store)), tokenizer)


def test_a_source_of_nothing_is_refused(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").touch()
    with pytest.raises(ConfigError, match=r"holds no usable document: .*a\.txt is empty"):
        survey(_config(tmp_path, kind="text_tree", path=str(tmp_path / "text")), byte_tokenizer())
