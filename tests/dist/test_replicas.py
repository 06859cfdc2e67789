"""Two replicas, each a job of its own, joined by SparseLoCo through the trainer."""

import multiprocessing
import socket
from pathlib import Path

import pytest
from support.tiny import build, parameter_hash, tiny_tree, write_text

from ltrain.config.base import ConfigError
from ltrain.config.load import validate


def _peers(folder, address, name):
    return {"rendezvous": address, "token_file": str(folder / "token"), "replica": name, "num_replicas": 2}


def _sync(folder, address, name, **fields):
    kind = {"kind": "sparse_loco", "steps_per_round": 2, "density": 0.25, **fields}
    return {**kind, "peers": _peers(folder, address, name)}


def _replica(folder, address, name, overrides, results):
    import torch

    torch.set_num_threads(1)
    try:
        tree = tiny_tree(Path(folder), run__name=name, sync=_sync(Path(folder), address, name), **overrides)
        run = build(tree)
        from ltrain.train.trainer import Trainer

        hashes = []
        trainer = Trainer(run.config, run)
        while run.step < 6:
            trainer.one_step()
            hashes.append(parameter_hash(run.model))
        state, _ = run.replicas.state()
        errors = {key for key in state if key.startswith("sync/error/")}
        trainer.measure.close()
        run.replicas.close()
        results.put((name, hashes, len(errors)))
    except BaseException as error:
        results.put((name, repr(error), 0))


@pytest.mark.parametrize("overrides", [{}, {"train__dtype": "bf16"}], ids=["fp32", "bf16"])
def test_two_replicas_agree_bit_for_bit_after_every_round(tmp_path, overrides):
    from ltrain.sync import serve

    write_text(tmp_path / "text")
    token = tmp_path / "token"
    token.write_text("a secret of the two replicas")
    token.chmod(0o600)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    service = serve(validate(tiny_tree(tmp_path, sync=_sync(tmp_path, address, "a"))).sync)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    jobs = []
    try:
        for seed, name in enumerate("ab"):
            # The replicas see different data; the weights come from the same seed.
            data = {"data__sources": [{"kind": "text_tree", "path": str(tmp_path / f"text-{name}")}]}
            write_text(tmp_path / f"text-{name}", seed=seed + 1)
            arguments = (str(tmp_path), address, name, {**overrides, **data}, results)
            jobs.append(context.Process(target=_replica, args=arguments, daemon=True))
            jobs[-1].start()
        outcome = {
            name: (hashes, errors) for name, hashes, errors in (results.get(timeout=200) for _ in jobs)
        }
    finally:
        for job in jobs:
            job.join(timeout=5)
            job.kill()
        service.close()
    (a, errors), (b, _) = outcome["a"], outcome["b"]
    assert isinstance(a, list), a
    assert isinstance(b, list), b
    assert errors > 0
    for step in (1, 3, 5):  # after the rounds at steps 2, 4 and 6
        assert a[step] == b[step]
    for step in (0, 2, 4):  # between rounds each goes its own way
        assert a[step] != b[step]


def test_gradient_averaging_with_peers_is_refused(tmp_path):
    peers = _peers(tmp_path, "127.0.0.1:1", "a")
    with pytest.raises(ConfigError, match=r"sync\.kind='every_step' cannot be joined by peers"):
        validate(tiny_tree(tmp_path, sync={"kind": "every_step", "peers": peers}))
