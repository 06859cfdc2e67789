import json
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from ltrain.config.base import ConfigError
from ltrain.config.data import DataConfig, Jsonl
from ltrain.data.loader import Corpus, Loader, held_out_rows, open_corpus
from ltrain.data.tokenizer import byte_tokenizer


def write(folder: Path, name: str, count: int, seed: int = 0, longest: int = 120) -> Path:
    """A JSONL file of `count` different texts of 1 to `longest` letters."""
    rng = np.random.default_rng(seed)
    lengths = np.minimum(longest, 1 + rng.geometric(1 / 25, size=count))
    texts = ["".join(map(chr, rng.integers(97, 123, size=n))) for n in lengths]
    (folder / name).write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return folder / name


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    return DataConfig(
        sources=(Jsonl(path=write(tmp_path, "a.jsonl", 120)),), holdout=0.1, cache=tmp_path / "cache"
    )


def corpus_of(config: DataConfig) -> Corpus:
    return open_corpus(config, byte_tokenizer())


def loader(config: DataConfig, corpus: Corpus | None = None, **changes) -> Loader:
    settings = {"seq_len": 64, "tokens_per_step": 256, "seed": 5, **changes}
    return Loader(config, corpus or corpus_of(config), **settings)


def content(step):
    return [(row.pieces, row.tokens.tolist()) for row in step.rows]


@pytest.mark.parametrize("packing", ["first_fit", "concat_split", "none"])
def test_resume_at_every_step_goes_on_exactly(config: DataConfig, packing: str) -> None:
    config = config.model_copy(update={"packing": packing})
    corpus = corpus_of(config)
    unbroken = loader(config, corpus, prefetch=False)
    steps, states = [], [json.loads(json.dumps(unbroken.state_dict()))]
    while unbroken._epoch < 2:  # every place inside an epoch and around its end
        steps.append(content(unbroken.next_step()))
        states.append(json.loads(json.dumps(unbroken.state_dict())))
    assert len(steps) > 10
    for at in range(len(steps) - 2):
        resumed = loader(config, corpus, prefetch=bool(at % 2))
        resumed.load_state_dict(states[at])
        assert [content(resumed.next_step()) for _ in range(2)] == steps[at : at + 2]
        assert resumed.state_dict() == states[at + 2]


def test_going_back_on_the_same_loader(config: DataConfig) -> None:
    run = loader(config)
    run.next_step()
    state = run.state_dict()
    expected = [content(run.next_step()) for _ in range(5)]
    run.load_state_dict(state)
    assert [content(run.next_step()) for _ in range(5)] == expected


@pytest.mark.parametrize("packing", ["first_fit", "concat_split", "none"])
def test_no_token_is_skipped_or_repeated(config: DataConfig, packing: str) -> None:
    config = config.model_copy(update={"packing": packing})
    corpus = corpus_of(config)
    run = loader(config, corpus)
    seen: dict[tuple[int, int], int] = {}

    def take() -> None:
        step = run.next_step()
        for row in step.rows:
            at = 0
            for piece in row.pieces:
                document = corpus.stores[piece.source][piece.document]
                given = row.tokens[at : at + piece.length]
                assert (given == document[piece.start : piece.start + piece.length]).all()
                at += piece.length
                for token in range(piece.start, piece.start + piece.length):
                    seen[piece.document, token] = seen.get((piece.document, token), 0) + 1
            assert (row.tokens[at:] == 0).all()

    for number in range(40):
        take()
        if number % 7 == 3:  # a new process, as after a failure
            state = json.loads(json.dumps(run.state_dict()))
            run = loader(config, corpus)
            run.load_state_dict(state)
    state = run.state_dict()
    # What the open rows hold is the only difference from whole epochs.
    waiting = [p for row in [*state["packer"], *state["ready"]] for p in row]
    for _, document, start, length in waiting:
        for token in range(start, start + length):
            seen[document, token] = seen.get((document, token), 0) + 1
    order = corpus.epoch_order(5, state["epoch"])[: state["cursor"]]
    again = {int(corpus.train[i, 1]) for i in order}
    lengths = corpus.stores[0].lengths
    expected = {
        (int(d), t): state["epoch"] + (int(d) in again)
        for d in corpus.train[:, 1]
        for t in range(lengths[d])
        if state["epoch"] + (int(d) in again)
    }
    assert seen == expected


def test_the_stream_does_not_depend_on_tokens_per_step(config: DataConfig) -> None:
    corpus = corpus_of(config)
    small, large = loader(config, corpus, tokens_per_step=64), loader(config, corpus, tokens_per_step=512)
    assert [c for _ in range(16) for c in content(small.next_step())] == [
        c for _ in range(2) for c in content(large.next_step())
    ]


def test_two_ranks_see_one_stream_and_seeds_differ(config: DataConfig) -> None:
    a, b, other = loader(config), loader(config), loader(config, seed=6)
    first = [content(a.next_step()) for _ in range(4)]
    assert first == [content(b.next_step()) for _ in range(4)]
    assert first != [content(other.next_step()) for _ in range(4)]


def test_steps_have_the_stated_size(config: DataConfig) -> None:
    for packing in ("first_fit", "concat_split"):
        step = loader(config.model_copy(update={"packing": packing})).next_step()
        assert [len(row.tokens) for row in step.rows] == [64] * 4
        tokens = sum(row.num_tokens for row in step.rows)
        assert step.stats["data/pack_fill"] == pytest.approx(tokens / 256)
        assert step.stats["data/pack_fill"] + step.stats["data/pad_frac"] == pytest.approx(1)
    run = loader(config.model_copy(update={"packing": "none"}))
    for _ in range(10):
        rows = run.next_step().rows
        assert all(len(row.tokens) == row.num_tokens == row.document_lengths[0] for row in rows)
        assert 256 - 64 < sum(row.num_tokens for row in rows) <= 256


def test_long_documents_are_split_or_dropped_and_counted(config: DataConfig) -> None:
    corpus = corpus_of(config)
    long = corpus.lengths(corpus.train) > 64
    assert long.any() and not long.all()
    for how in ("split", "drop"):
        run = loader(config.model_copy(update={"long_documents": how}), corpus, tokens_per_step=64)
        while run.next_step().stats["data/epoch"] == 0:
            pass
        state = run.state_dict()
        read = corpus.epoch_order(5, 1)[: state["cursor"]]
        lengths = np.concatenate([corpus.lengths(corpus.train), corpus.lengths(corpus.train[read])])
        assert state["dropped_tokens"] == (lengths[lengths > 64].sum() if how == "drop" else 0)
        assert state["split_documents"] == ((lengths > 64).sum() if how == "split" else 0)


def test_max_document_tokens_bounds_every_document(config: DataConfig) -> None:
    for packing in ("first_fit", "concat_split", "none"):
        run = loader(config.model_copy(update={"packing": packing, "max_document_tokens": 16}))
        assert max(n for _ in range(5) for row in run.next_step().rows for n in row.document_lengths) == 16


def test_training_never_sees_held_out_text_even_as_a_copy(tmp_path: Path) -> None:
    one = write(tmp_path, "a.jsonl", 200)
    lines = one.read_text().splitlines(keepends=True)
    (tmp_path / "b.jsonl").write_text("".join(reversed(lines)))
    config = DataConfig(
        sources=(Jsonl(path=one), Jsonl(path=tmp_path / "b.jsonl")), holdout=0.2, cache=tmp_path / "c"
    )
    corpus = corpus_of(config)
    train = {corpus.tokens(entry).tobytes() for entry in corpus.train}
    held = {corpus.tokens(entry).tobytes() for entry in corpus.held_out}
    assert not train & held
    assert len(corpus.train) + len(corpus.held_out) == 400
    assert 0.1 < len(corpus.held_out) / 400 < 0.3
    # The sources' held-out documents alternate, so that a short evaluation has text of all.
    assert set(corpus.held_out[:6, 0]) == {0, 1}


def test_the_split_stays_when_files_are_added(tmp_path: Path, config: DataConfig) -> None:
    def held(corpus: Corpus) -> set[bytes]:
        return {corpus.tokens(entry).tobytes() for entry in corpus.held_out}

    before = corpus_of(config)
    file = config.sources[0].path
    file.write_text(json.dumps({"text": "a new first document"}) + "\n" + file.read_text())
    after = corpus_of(config)
    assert before.fingerprint != after.fingerprint
    assert held(before) <= held(after)


def test_held_out_rows_are_fixed(config: DataConfig) -> None:
    corpus = corpus_of(config)
    rows = held_out_rows(config, corpus, seq_len=64, max_tokens=200, min_tokens=10)
    again = held_out_rows(config, corpus, seq_len=64, max_tokens=200, min_tokens=10)
    assert [r.tokens.tolist() for r in rows] == [r.tokens.tolist() for r in again]
    lengths = [n for row in rows for n in row.document_lengths]
    assert rows and sum(lengths) <= 200 and min(lengths) >= 10 and max(lengths) <= 64
    held = {(0, int(d)) for d in corpus.held_out[:, 1]}
    assert {(p.source, p.document) for row in rows for p in row.pieces} <= held
    assert held_out_rows(config, corpus, seq_len=64, max_tokens=0, min_tokens=0) == []


def test_weights_give_every_source_its_share(tmp_path: Path) -> None:
    a, b = write(tmp_path, "a.jsonl", 40, seed=1), write(tmp_path, "b.jsonl", 40, seed=2)
    sources = (Jsonl(path=a, weight=2.25), Jsonl(path=b, weight=0.1))
    corpus = corpus_of(DataConfig(sources=sources, holdout=0, cache=tmp_path / "c"))
    epochs = [corpus.epoch_order(1, e) for e in range(20)]
    given = np.bincount(np.concatenate(epochs), minlength=80)
    assert given[:40].sum() == 20 * 2.25 * 40
    assert given[40:].sum() == 20 * 0.1 * 40
    assert all(np.bincount(order, minlength=80)[:40].min() == 2 for order in epochs)


def test_length_filters(tmp_path: Path) -> None:
    source = Jsonl(path=write(tmp_path, "a.jsonl", 100), min_tokens=10, max_tokens=30)
    corpus = corpus_of(DataConfig(sources=(source,), holdout=0, cache=tmp_path / "c"))
    lengths = corpus.lengths(corpus.train)
    every = corpus.stores[0].lengths
    assert len(lengths) == ((every >= 10) & (every <= 30)).sum() > 0
    assert lengths.min() >= 10 and lengths.max() <= 30
    assert sum(n for _, n, _ in corpus.histogram()) == len(lengths)
    assert sum(n for _, _, n in corpus.histogram()) == lengths.sum()
    assert all(upper <= 32 for upper, _, _ in corpus.histogram())


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"seed": 6}, "run.seed=6 must be 5"),
        ({"seq_len": 128}, "train.seq_len=128 must be 64"),
        ({"packing": "concat_split"}, "data.packing='concat_split' must be 'first_fit'"),
        ({"holdout": 0.2}, "data.holdout=0.2 must be 0.1"),
        ({"long_documents": "drop"}, "data.long_documents='drop' must be 'split'"),
        ({"max_document_tokens": 8}, "data.max_document_tokens=8 must be None"),
    ],
)
def test_changed_settings_are_refused_on_resume(config: DataConfig, changes: dict, field: str) -> None:
    run = loader(config)
    run.next_step()
    arguments = {name: changes[name] for name in ("seed", "seq_len") if name in changes}
    fields = {name: changes[name] for name in changes if name not in arguments}
    with pytest.raises(ConfigError) as error:
        loader(config.model_copy(update=fields), **arguments).load_state_dict(run.state_dict())
    assert str(error.value).startswith(field)


def test_changed_data_is_refused_on_resume(config: DataConfig) -> None:
    run = loader(config)
    run.next_step()
    file = config.sources[0].path
    text = file.read_text()
    at = len(text) // 2
    while not text[at].islower() or text[at - 8 : at].count('"'):
        at += 1
    file.write_text(text[:at] + ("a" if text[at] != "a" else "b") + text[at + 1 :])  # no length changes
    with pytest.raises(ConfigError, match=r"data\.sources=.* is other data than the checkpoint's"):
        loader(config).load_state_dict(run.state_dict())


def test_an_error_in_the_thread_reaches_the_trainer(config: DataConfig) -> None:
    corpus = corpus_of(config)
    run = loader(config, corpus)
    run.next_step()
    run._pending[0].result()
    corpus.stores[0].vocab_size = 1
    run.next_step()
    with pytest.raises(ConfigError, match="ids must be below 1"):
        run.next_step()


def test_input_that_leaves_nothing_is_refused(config: DataConfig) -> None:
    with pytest.raises(ConfigError, match=r"train\.tokens_per_step=200 must be a multiple.*use 192 or 256"):
        loader(config, tokens_per_step=200)
    with pytest.raises(ConfigError, match=r"data\.long_documents='drop' drops every document"):
        loader(config.model_copy(update={"long_documents": "drop", "max_document_tokens": 2}))
    source = config.sources[0].model_copy(update={"min_tokens": 10000})
    with pytest.raises(ConfigError, match=r"data\.sources\[0\]=.*0 pass the length filters"):
        corpus_of(config.model_copy(update={"sources": (source,)}))
    with pytest.raises(ValidationError, match=r"max_tokens=3 must be at least min_tokens=4"):
        Jsonl(path="x", min_tokens=4, max_tokens=3)


def test_errors_travel_between_processes() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(ConfigError("data.cache", 1, "is wrong", "mend it")))
    assert isinstance(error, ConfigError) and str(error) == "data.cache=1 is wrong; mend it"


def test_steps_read_ahead_come_next_and_leave_the_state_alone(config: DataConfig) -> None:
    corpus = corpus_of(config)
    plain, ahead = loader(config, corpus, prefetch=0), loader(config, corpus, prefetch=3)
    for _ in range(4):
        assert content(plain.next_step()) == content(ahead.next_step())
        assert plain.state_dict() == ahead.state_dict()
        ahead._pending[-1].result()
        coming = ahead.upcoming()
        assert len(coming) == 3
    state, want = plain.state_dict(), content(plain.next_step())
    assert ahead.next_step() is coming[0]
    ahead.load_state_dict(state)
    assert ahead.upcoming() == []
    assert content(ahead.next_step()) == want
