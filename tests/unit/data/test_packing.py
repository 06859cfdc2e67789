import json
import random

import numpy as np
import pytest

from ltrain.data.packing import Packer, split_document
from ltrain.data.rows import IGNORE, PADDING, Piece, Row


def pieces_of(lengths):
    return [Piece(0, i, 0, length) for i, length in enumerate(lengths)]


def spans(rows):
    """(document, token) of every token in the rows, sorted."""
    return sorted((p.document, p.start + i) for row in rows for p in row for i in range(p.length))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("kind", ["first_fit", "concat_split", "none"])
def test_every_token_is_in_exactly_one_row(kind: str, seed: int) -> None:
    rng = random.Random(seed)
    length = rng.choice([1, 7, 64])
    lengths = [rng.randint(1, length) for _ in range(rng.randint(1, 200))]
    packer = Packer(kind, length, open_rows=rng.choice([1, 4, 32]))
    rows = []
    for i, piece in enumerate(pieces_of(lengths)):
        complete = packer.push(piece)
        if kind == "concat_split":
            assert all(sum(p.length for p in row) == length for row in complete)
        rows += complete
        if i % 50 == 17:
            state = json.loads(json.dumps(packer.state_dict()))
            packer = Packer(kind, length, packer.open_rows)
            packer.load_state_dict(state)
    rows += packer.flush()
    assert packer.flush() == []
    assert all(0 < sum(p.length for p in row) <= length for row in rows)
    assert spans(rows) == [(i, j) for i, n in enumerate(lengths) for j in range(n)]
    if kind == "first_fit":
        assert all(p.start == 0 and p.length == lengths[p.document] for row in rows for p in row)


def test_first_fit_places_whole_documents_where_they_fit_first() -> None:
    packer = Packer("first_fit", 10, open_rows=2)
    a, b, c, d, e, f = pieces_of([6, 7, 3, 3, 9, 8])
    assert packer.push(a) == []
    assert packer.push(b) == []
    assert packer.push(c) == []  # beside a: 9 of 10
    assert packer.push(d) == [(b, d)]  # beside b: full
    assert packer.push(e) == []
    assert packer.push(f) == [(a, c)]  # three rows are open: the fullest closes, the older at a tie
    assert packer.flush() == [(e,), (f,)]


def test_concat_split_is_one_stream() -> None:
    packer = Packer("concat_split", 4)
    assert packer.push(Piece(0, 5, 0, 3)) == []
    assert packer.push(Piece(0, 6, 2, 9)) == [
        (Piece(0, 5, 0, 3), Piece(0, 6, 2, 1)),
        (Piece(0, 6, 3, 4),),
        (Piece(0, 6, 7, 4),),
    ]
    assert packer.flush() == []


def test_long_documents_are_split_or_dropped() -> None:
    piece = Piece(1, 2, 0, 10)
    assert split_document(piece, 10, "drop") == ([piece], 0)
    assert split_document(piece, 9, "drop") == ([], 10)
    expected = [Piece(1, 2, 0, 4), Piece(1, 2, 4, 4), Piece(1, 2, 8, 2)]
    assert split_document(piece, 4, "split") == (expected, 0)


def test_arrays_of_a_row() -> None:
    row = Row(np.array([5, 6, 7, 8, 9, 0, 0], dtype=np.int32), (3, 2))
    tokens, labels, positions, doc_ids = row.arrays()
    assert tokens.tolist() == [5, 6, 7, 8, 9, 0, 0]
    assert labels.tolist() == [6, 7, IGNORE, 9, IGNORE, IGNORE, IGNORE]
    assert positions.tolist() == [0, 1, 2, 0, 1, 0, 1]
    assert doc_ids.tolist() == [0, 0, 0, 1, 1, PADDING, PADDING]
    assert {a.dtype for a in row.arrays()} == {np.dtype(np.int32)}
    assert (row.without_targets().arrays()[1] == IGNORE).all()


def test_without_document_mask_a_row_is_one_document_whose_targets_still_end() -> None:
    _, labels, positions, doc_ids = Row(np.arange(6, dtype=np.int32), (3, 2), document_mask=False).arrays()
    assert labels.tolist() == [1, 2, IGNORE, 4, IGNORE, IGNORE]
    assert positions.tolist() == [0, 1, 2, 3, 4, 5]
    assert doc_ids.tolist() == [0, 0, 0, 0, 0, PADDING]


def test_a_row_without_documents_has_no_target() -> None:
    _, labels, _, doc_ids = Row(np.zeros(4, dtype=np.int32), ()).arrays()
    assert labels.tolist() == [IGNORE] * 4
    assert doc_ids.tolist() == [PADDING] * 4
