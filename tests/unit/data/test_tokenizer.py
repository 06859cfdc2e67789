import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from ltrain.config.base import ConfigError
from ltrain.data.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer

TEXT = "def f(x):\n\treturn 'héllo ☃ e\u0301'  <s></s>\r\n" * 3


def test_byte_ids_are_the_bytes() -> None:
    tokenizer = byte_tokenizer()
    assert tokenizer.encode(TEXT).tolist() == [256, *TEXT.encode(), 257]
    assert tokenizer.encode(TEXT).dtype == np.int32
    assert tokenizer.vocab_size == 258
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


def test_the_short_cut_for_bytes_agrees_with_the_hugging_face_engine() -> None:
    tokenizer = byte_tokenizer()
    text = "".join(map(chr, range(1, 0x500))) + TEXT
    assert Tokenizer(tokenizer._engine, "engine").encode(text).tolist() == tokenizer.encode(text).tolist()


def test_bytes_decode_as_the_hugging_face_engine_does() -> None:
    tokenizer = byte_tokenizer()
    ids = np.random.default_rng(0).integers(0, 258, 3000)
    for part in (ids, TEXT.encode()[:-1], [256, 0xE2, 0x98, 65, 257], []):
        assert tokenizer.decode(part) == Tokenizer(tokenizer._engine, "engine").decode(part)


WITHOUT = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == {module!r}:
            raise ModuleNotFoundError("No module named " + {module!r}, name={module!r})
sys.meta_path.insert(0, Missing())
from ltrain.config.base import ConfigError
from ltrain.data.tokenizer import load_tokenizer
tokenizer = load_tokenizer("byte")
print(tokenizer.fingerprint, tokenizer.decode(tokenizer.encode("a")))
try:
    load_tokenizer({folder!r})
except ConfigError as error:
    print(error)
"""


@pytest.mark.parametrize("module", ["transformers", "huggingface_hub"])
def test_a_package_that_is_missing_is_named(tmp_path: Path, module: str) -> None:
    byte_tokenizer().save(tmp_path)
    script = WITHOUT.format(module=module, folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
    first, error = done.stdout.splitlines()[:2]
    assert first == f"{byte_tokenizer().fingerprint} a"
    assert f"cannot be imported: No module named {module}; pip install {module}" in error


@pytest.mark.parametrize("family", [None, "llama", "qwen2", "qwen3", "mistral"])
def test_saved_in_a_model_folder_it_loads_again(tmp_path: Path, family: str | None) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.save(tmp_path)
    if family:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    again = load_tokenizer(str(tmp_path))
    assert again.fingerprint == tokenizer.fingerprint
    assert again.encode(TEXT).tolist() == tokenizer.encode(TEXT).tolist()
    assert (again.bos_id, again.eos_id, again.vocab_size) == (256, 257, 258)


def test_transformers_loads_it(tmp_path: Path) -> None:
    byte_tokenizer().save(tmp_path)
    engine = AutoTokenizer.from_pretrained(tmp_path)
    ids = engine("héllo ☃", add_special_tokens=False)["input_ids"]
    assert ids == list("héllo ☃".encode())
    assert engine.decode(ids) == "héllo ☃"
    assert engine.bos_token_id == 256 and engine.eos_token_id == 257


def word_tokenizer(folder: Path, words: list[str], eos: str = "</s>") -> Tokenizer:
    """A small word-level tokenizer with gaps in its ids, saved in `folder`."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {word: 2 * i for i, word in enumerate([*words, "<unk>", eos])}
    backend = Backend(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, unk_token="<unk>").save_pretrained(
        folder
    )
    return load_tokenizer(str(folder))


def test_a_hugging_face_folder(tmp_path: Path) -> None:
    tokenizer = word_tokenizer(tmp_path / "a", ["a", "b"])
    assert tokenizer.bos_id is None
    assert tokenizer.encode("b a").tolist() == [2, 0, 6]
    assert tokenizer.vocab_size == 7  # one more than the largest id, though only 4 ids are used
    assert [x.tolist() for x in tokenizer.encode_batch(["a", "b b"])] == [[0, 6], [2, 2, 6]]


def test_the_fingerprint_follows_what_encode_does(tmp_path: Path) -> None:
    prints = {
        word_tokenizer(tmp_path / "a", ["a", "b"]).fingerprint,
        word_tokenizer(tmp_path / "b", ["b", "a"]).fingerprint,
        word_tokenizer(tmp_path / "c", ["a", "b"], eos="<end>").fingerprint,
        byte_tokenizer().fingerprint,
    }
    assert len(prints) == 4
    assert load_tokenizer(str(tmp_path / "a")).fingerprint in prints


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.tokenizer='nowhere' must be `byte` or a folder"):
        load_tokenizer("nowhere")
    with pytest.raises(ConfigError, match=r"data\.tokenizer=.* cannot be loaded"):
        load_tokenizer(str(tmp_path))
    byte_tokenizer().save(tmp_path)
    for file, text in (("tokenizer.json", "{}"), ("tokenizer_config.json", "{")):
        (tmp_path / file).write_text(text)
        with pytest.raises(ConfigError, match=r"data\.tokenizer=.* cannot be loaded"):
            load_tokenizer(str(tmp_path))
