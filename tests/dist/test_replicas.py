"""Replicas, each a job of its own, joined by SparseLoCo through the trainer."""

import contextlib
import multiprocessing
import os
import socket
from pathlib import Path

import pytest
import torch
from support.tiny import build, parameter_hash, tiny_tree, write_text

from ltrain.config.base import ConfigError
from ltrain.config.load import validate
from ltrain.train.plan import check_run

_SPAWN = multiprocessing.get_context("spawn")


def _peers(folder, address, name):
    return {"rendezvous": address, "token_file": str(folder / "token"), "replica": name, "num_replicas": 2}


def _sync(folder, address, name, peers=None, **fields):
    kind = {"kind": "sparse_loco", "steps_per_round": 2, "density": 0.25, **fields}
    return {**kind, "peers": _peers(folder, address, name) | (peers or {})}


def _address():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


@contextlib.contextmanager
def _service(folder, address, **fields):
    from ltrain.sync import serve

    token = folder / "token"
    token.write_text("a secret of the two replicas")
    token.chmod(0o600)
    service = serve(validate(tiny_tree(folder, sync=_sync(folder, address, "a", **fields))).sync)
    try:
        yield
    finally:
        service.close()


def _start(target, *arguments):
    results = _SPAWN.Queue()
    jobs = [_SPAWN.Process(target=target, args=(*own, results), daemon=True) for own in arguments]
    for job in jobs:
        job.start()
    return jobs, results


def _collect(jobs, results):
    """What every job gave, by its name."""
    try:
        found = dict(results.get(timeout=200) for _ in jobs)
    finally:
        for job in jobs:
            job.join(timeout=5)
            job.kill()
    for name, outcome in found.items():
        assert not isinstance(outcome, str), f"{name}: {outcome}"
    return found


def _text(folder, name):
    """The replicas see different data; the weights come from the same seed."""
    path = folder / f"text-{name}"
    if not path.exists():
        write_text(path, seed=ord(name[0]))
    return {"data__sources": [{"kind": "text_tree", "path": str(path)}]}


def _guarded(job):
    """A target whose failure is a result, not a test that waits."""

    def run(folder, name, *arguments):
        *arguments, results = arguments
        torch.set_num_threads(1)
        try:
            results.put((name, job(Path(folder), name, *arguments)))
        except BaseException as error:
            results.put((name, repr(error)))

    return run


def _replica(*arguments):
    _guarded(_train_six)(*arguments)


def _train_six(folder, name, address, overrides, break_at):
    """Six steps, from a checkpoint after `break_at` of them: the hash of the parameters after each."""
    from ltrain.train.main import restore
    from ltrain.train.trainer import Trainer

    sync = _sync(folder, address, name, **overrides.pop("sync", {}))
    run_name = f"{name}-{break_at}"
    tree = tiny_tree(folder, run__name=run_name, sync=sync, **overrides, **_text(folder, name))
    run = build(tree)
    trainer = Trainer(run.config, run)
    hashes = []
    while run.step < 6:
        if run.step == break_at:
            trainer.save(wait=True)
            trainer.measure.close()
            run.replicas.close()
            run = build(tree)
            restore(run.config, run)
            trainer = Trainer(run.config, run)
        trainer.one_step()
        hashes.append(parameter_hash(run.model))
    run.replicas.finish()
    hashes.append(parameter_hash(run.model))
    state, _ = run.replicas.state()
    errors = sorted(key for key in state if key.startswith("sync/error/"))
    error = torch.cat([state[key].view(-1) for key in errors]).numpy().tobytes()
    trainer.measure.close()
    run.replicas.close()
    return hashes, len(errors), error


def _two_replicas(folder, overrides, break_at=None):
    address = _address()
    with _service(folder, address, **overrides.get("sync", {})):
        for name in "ab":
            _text(folder, name)
        return _collect(*_start(_replica, *((str(folder), n, address, dict(overrides), break_at) for n in "ab")))


@pytest.mark.parametrize("overrides", [{}, {"train__dtype": "bf16"}], ids=["fp32", "bf16"])
def test_two_replicas_agree_bit_for_bit_after_every_round(tmp_path, overrides):
    outcome = _two_replicas(tmp_path, overrides)
    (a, errors, _), (b, _, _) = outcome["a"], outcome["b"]
    assert errors > 0
    for step in (1, 3, 5):  # after the rounds at steps 2, 4 and 6
        assert a[step] == b[step]
    for step in (0, 2, 4):  # between rounds each goes its own way
        assert a[step] != b[step]


@pytest.mark.parametrize(
    "fields", [{}, {"overlap": "delayed"}, {"kind": "diloco", "density": None}], ids=["sync", "delayed", "diloco"]
)
def test_a_resumed_replica_is_bitwise_the_unbroken_one(tmp_path, fields):
    """Both stop after step 3, in the middle of a round, and go on from their checkpoints."""
    fields = {name: value for name, value in fields.items() if value is not None}
    whole = _two_replicas(tmp_path, {"sync": fields})
    broken = _two_replicas(tmp_path, {"sync": fields}, break_at=3)
    for name in "ab":
        assert broken[name][0] == whole[name][0], name
        assert broken[name][2] == whole[name][2], name
    assert whole["a"][0][-1] == whole["b"][0][-1]


def _mixed(*arguments):
    _guarded(_train_mixed)(*arguments)


def _train_mixed(folder, name, address, overrides, rank, port):
    """Six steps of a rank; the digests of its shards after every round, and how its writers lie."""
    from ltrain.train.stage_links import WRITERS
    from ltrain.train.trainer import Trainer

    if rank is not None:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sync = _sync(folder, address, name[0], {"stages": 2})
    run = build(tiny_tree(folder, run__name=name[0], sync=sync, **overrides, **_text(folder, name[0])))
    trainer, digests = Trainer(run.config, run), []
    while run.step < 6:
        trainer.one_step()
        if run.step % 2 == 0:
            digests.append(run.replicas.sync._digests())
    shares = {}
    if hasattr(run.links, "space"):
        for source, tensors in (("local", dict(run.model.named_parameters())), ("global", run.replicas.sync.outer.theta)):
            for key, tensor in tensors.items():
                if any(writer in f".{key}" for writer in WRITERS):
                    matrix = tensor.detach().view(32, -1).t()
                    shares[source] = float(run.links.space.outside(matrix).norm() / matrix.norm())
    trainer.measure.close()
    run.replicas.close()
    return digests, shares


def test_a_full_replica_and_a_pipeline_with_a_compressed_link(tmp_path):
    """Stage by stage they hold the same global parameters; only the slow one's own are in the subspace."""
    address, port = _address(), int(_address().split(":")[1])
    slow = {"parallel__pipeline": 2, "parallel__stage_links": {"kind": "projection", "rank": 8}}
    for name in "fs":
        _text(tmp_path, name)
    with _service(tmp_path, address, peers={"stages": 2}):
        jobs, results = _start(
            _mixed,
            (str(tmp_path), "full", address, {}, None, port),
            *((str(tmp_path), f"s{rank}", address, slow, rank, port) for rank in (0, 1)),
        )
        outcome = _collect(jobs, results)
    full, shares = outcome["full"][0], outcome["s0"][1]
    assert len(full) == 3
    for round_, whole in enumerate(full):
        assert whole == outcome["s0"][0][round_] | outcome["s1"][0][round_]
    assert sorted(full[0]) == ["stage0", "stage1"]
    assert shares["local"] < 1e-6 and shares["global"] > 0.1


def test_gradient_averaging_with_peers_is_refused(tmp_path):
    peers = _peers(tmp_path, "127.0.0.1:1", "a")
    with pytest.raises(ConfigError, match=r"sync\.kind='every_step' cannot be joined by peers"):
        validate(tiny_tree(tmp_path, sync={"kind": "every_step", "peers": peers}))


@pytest.mark.parametrize(
    "stages,overrides,says",
    [
        (3, {}, "must divide the model's number of layers, 2"),
        (1, {"parallel__pipeline": 2}, r"must be a multiple of parallel\.pipeline=2"),
        (2, {"model__tie_embeddings": True}, "must be 1 for a model whose output matrix is its token embedding"),
    ],
)
def test_stages_that_do_not_divide_are_refused_before_the_start(tmp_path, stages, overrides, says):
    write_text(tmp_path / "text", 2)
    sync = _sync(tmp_path, "127.0.0.1:1", "a", {"stages": stages})
    with pytest.raises(ConfigError, match=says):
        check_run(validate(tiny_tree(tmp_path, sync=sync, **overrides)), 2)
