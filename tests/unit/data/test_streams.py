"""Parts of a row, and streams of parts: every token keeps its label, position and visible tokens."""

from __future__ import annotations

import numpy as np
import pytest

from ltrain.data.rows import IGNORE, PADDING, Piece, Row, Stream

TOKENS = np.arange(100, 140, dtype=np.int32)
PIECES = tuple(Piece(0, d, 0, n) for d, n in enumerate((7, 1, 20)))


def _row(**fields) -> Row:
    return Row(TOKENS, (7, 1, 20), pieces=PIECES, **fields)


@pytest.mark.parametrize("targets", [True, False])
@pytest.mark.parametrize("mask", [True, False])
def test_a_part_keeps_the_labels_and_positions_of_the_row(mask: bool, targets: bool) -> None:
    row = _row(document_mask=mask, targets=targets)
    parts = row.parts()
    assert [part.num_tokens for part in parts] == ([7, 1, 20] if mask else [28])
    joined = [np.concatenate(arrays) for arrays in zip(*(part.arrays()[:3] for part in parts), strict=True)]
    for have, want in zip(joined, row.arrays()[:3], strict=True):
        np.testing.assert_array_equal(have, want[:28])
    assert [piece for part in parts for piece in part.pieces] == list(PIECES)


def test_a_stream_of_parts_in_any_order_is_padded_and_numbers_its_parts() -> None:
    first, second = _row(), _row(document_mask=False)
    parts = (second.parts()[0], first.parts()[2], first.parts()[0])
    stream = Stream(parts, 60)
    tokens, labels, positions, doc_ids = stream.arrays()
    assert stream.document_lengths == (7, 1, 20, 20, 7)
    np.testing.assert_array_equal(doc_ids, [0] * 28 + [1] * 20 + [2] * 7 + [PADDING] * 5)
    np.testing.assert_array_equal(positions, [*range(28), *range(20), *range(7), *range(5)])
    at = 0
    for part in parts:
        np.testing.assert_array_equal(tokens[at : at + part.num_tokens], part.tokens)
        np.testing.assert_array_equal(labels[at : at + part.num_tokens], part.arrays()[1])
        at += part.num_tokens
    assert (labels[at:] == IGNORE).all()
    # The unmasked row's targets still end where its documents end.
    assert labels[6] == labels[7] == labels[27] == IGNORE and labels[5] == TOKENS[6]


def test_a_row_of_padding_has_no_parts_and_an_idle_stream_no_targets() -> None:
    assert Row(TOKENS, ()).parts() == []
    tokens, labels, positions, doc_ids = Stream((), 3).arrays()
    assert (labels == IGNORE).all() and (doc_ids == PADDING).all() and list(positions) == [0, 1, 2]
    assert len(tokens) == 3
