"""Perplexity: every target once, with the context it should have, in the right bucket."""

import math

import pytest
import torch
from support.eval_models import scripted

from ltrain.eval.perplexity import bucket_end, perplexity, window_losses


class Recorder:
    """Stands for a model: the loss of a token is how many tokens it sees, over 1000."""

    def losses(self, ids):
        return torch.arange(1, len(ids), dtype=torch.float32) / 1000


@pytest.mark.parametrize("length", [2, 31, 32, 33, 48, 49, 100])
def test_every_target_counts_once_with_half_a_window_of_context_at_least(length):
    losses = window_losses(Recorder(), range(length), 32)
    assert len(losses) == length - 1
    seen = (losses * 1000).round().int().tolist()
    assert seen[:31] == list(range(1, min(length, 32)))
    assert all(16 <= n < 32 for n in seen[31:])


def test_buckets_hold_the_means_of_their_targets():
    documents = [range(300), range(100)]
    found = perplexity(Recorder(), documents, 1024)
    assert found["targets"] == 299 + 99
    assert found["targets_by_position"] == {128: 128 + 99, 256: 128, 512: 43}
    assert found["by_position"][256] == pytest.approx(sum(range(129, 257)) / 128 / 1000)
    assert found["by_document_length"][128] == pytest.approx(sum(range(1, 100)) / 99 / 1000)
    assert found["targets_by_document_length"] == {512: 299, 128: 99}
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))


def test_bucket_ends():
    assert [bucket_end(n) for n in (0, 127, 128, 255, 256, 4096)] == [128, 128, 256, 256, 512, 8192]


def test_a_uniform_model_has_the_loss_of_its_vocabulary():
    model = scripted(lambda text: "")
    model.model.forward = lambda input_ids, **_: type(
        "Output", (), {"logits": torch.zeros(1, input_ids.shape[1], 258), "past_key_values": None}
    )()
    assert perplexity(model, [list(b"some text")], 64)["loss"] == pytest.approx(math.log(258))
