"""The metrics of a held-out evaluation: losses and target counts of the buckets that hold targets."""

from ltrain.metrics.names import is_known
from ltrain.train.evaluate import Evaluation


def test_losses_and_counts_of_filled_buckets():
    metrics = Evaluation(2.0, (128, 256, 512), (2.5, float("nan"), 1.5), (10, 0, 30)).metrics()
    assert metrics["eval/loss"] == 2.0
    by_position = {name: value for name, value in metrics.items() if "_pos/" in name}
    assert by_position == {
        "eval/loss_pos/128": 2.5,
        "eval/loss_pos/512": 1.5,
        "eval/targets_pos/128": 10.0,
        "eval/targets_pos/512": 30.0,
    }
    assert all(is_known(name) for name in metrics)
