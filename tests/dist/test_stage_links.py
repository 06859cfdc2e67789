"""Compressed stage boundaries in mcore's pipeline: two stages, two processes, through the trainer."""

from pathlib import Path

import numpy as np
import pytest
from megatron.core.pipeline_parallel import p2p_communication
from support.distributed import run_ranks
from support.tiny import build, parameter_hash, tiny_tree, write_text

from ltrain.config.base import ConfigError
from ltrain.config.load import validate
from ltrain.train.plan import check_run

RANK, HIDDEN, STEPS = 8, 32, 3
LINKS = {
    "plain": None,
    "identity": {"kind": "identity"},
    "full-rank": {"kind": "projection", "rank": HIDDEN},
    "lossy": {"kind": "projection", "rank": RANK, "adaptations": ()},
    "projection": {"kind": "projection", "rank": RANK},
    "reparametrised": {"kind": "reparametrised", "rank": RANK},
    "reparametrised-uncompressed": {"kind": "reparametrised", "rank": RANK, "slow": ()},
    "reparametrised-free": {"kind": "reparametrised", "rank": RANK, "free_layers": 1},
}


def _tree(folder, name, links, **overrides):
    if links is not None:
        overrides["parallel__stage_links"] = links
    return tiny_tree(Path(folder), run__name=name, **overrides)


def _train(folder, name, links, **overrides):
    """Losses, last gradients, and the hidden states and gradients that this rank sent, by width."""
    from ltrain.train.optimizer import optimizer_step
    from ltrain.train.step import reduce_totals, run_model

    run = build(_tree(folder, name, links, optimizer__distributed=False, **overrides))
    sent = {}

    def counting(*, tensor_send_prev, tensor_send_next, **others):
        for tensor in (tensor_send_prev, tensor_send_next):
            if tensor is not None:
                sent[tensor.shape[-1]] = sent.get(tensor.shape[-1], 0) + tensor.nbytes
        return send(tensor_send_prev=tensor_send_prev, tensor_send_next=tensor_send_next, **others)

    send, p2p_communication._p2p_ops = p2p_communication._p2p_ops, counting
    losses = []
    try:
        for _ in range(STEPS):
            batches = run.assignment.batches(run.loader.next_step().rows)
            run.ddp.zero_grad_buffer()
            run.optimizer.zero_grad()
            losses.append(reduce_totals(run_model(run.ddp, run.mesh, batches, train=True), run.mesh).loss)
            optimizer_step(run.optimizer, 1.0)
            run.links.after_step()
    finally:
        p2p_communication._p2p_ops = send
    return run, {
        "losses": losses,
        "hash": parameter_hash(run.model),
        "gradients": {n: p.main_grad.numpy().copy() for n, p in run.model.named_parameters()},
        "sent": sent,
        "counted": run.links.bytes_sent().get("comm/bytes_stage_links"),
    }


def _writers_outside(run):
    """Largest share that a residual writer of this stage has outside of the subspace."""
    from ltrain.train.stage_links import WRITERS

    writers = [p.detach().t() for n, p in run.model.named_parameters() if n.endswith(WRITERS)]
    return max(float(run.links.space.outside(w).norm() / w.norm()) for w in writers)


def _pipelines(rank, world_size, folder):
    outcomes = {}
    for name, links in LINKS.items():
        run, outcomes[name] = _train(folder, name, links, parallel__pipeline=2)
        if name in ("projection", "full-rank"):
            table = run.model.embedding.word_embeddings.weight.detach() if rank == 0 else None
            outcomes[name] |= {
                "anchors": run.links.state()["stage_links/anchors"].numpy().copy(),
                "outside": run.links.space.outside(table).numpy() if rank == 0 else None,
                "writers": _writers_outside(run),
            }
        if name == "reparametrised":
            outcomes["exported"] = _exported(folder, run)
    return outcomes


def _exported(folder, run):
    """First losses of the exported model, trained on with the same subspace and refused with another."""
    from ltrain.train.main import export_run

    path = Path(folder) / "hf"
    export_run(run, path)
    links = {"kind": "reparametrised", "rank": RANK}
    model = {"kind": "hf", "path": str(path)}
    same = _train(folder, "same", links, parallel__pipeline=2, model=model)[1]
    whole = _train(folder, "whole", None, parallel__pipeline=2, model=model)[1]
    try:
        build(_tree(folder, "other", {**links, "seed": 1}, parallel__pipeline=2, model=model))
        refusal = ""
    except ConfigError as error:
        refusal = str(error)
    return same["losses"][0], whole["losses"][0], refusal


def _one(rank, world_size, folder):
    return _train(folder, "one", {"kind": "reparametrised", "rank": RANK})[1]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("links")
    write_text(folder / "text")
    return run_ranks(_one, 1, str(folder))[0], run_ranks(_pipelines, 2, str(folder))


def _close(a, b, tolerance):
    for rank_a, rank_b in zip(a, b, strict=True):
        np.testing.assert_allclose(rank_a["losses"], rank_b["losses"], rtol=tolerance)
        for name, gradient in rank_a["gradients"].items():
            error = np.linalg.norm(gradient - rank_b["gradients"][name])
            assert error <= 20 * tolerance * np.linalg.norm(gradient), name


def _of(outcomes, name):
    return [rank[name] for rank in outcomes[1]]


def test_identity_changes_no_bit(outcomes):
    for plain, identity in zip(_of(outcomes, "plain"), _of(outcomes, "identity"), strict=True):
        assert plain["losses"] == identity["losses"]
        assert plain["hash"] == identity["hash"]
        assert plain["counted"] is None


def test_reparametrised_layers_lose_nothing_on_a_compressed_link(outcomes):
    whole = _of(outcomes, "reparametrised-uncompressed")
    _close(_of(outcomes, "reparametrised"), whole, 1e-6)
    np.testing.assert_allclose(outcomes[0]["losses"], whole[0]["losses"], rtol=1e-6)
    assert whole[0]["losses"][-1] < whole[0]["losses"][0] - 0.05
    assert _of(outcomes, "reparametrised-free")[1]["losses"] != whole[1]["losses"]


def test_full_rank_projection_is_the_plain_model(outcomes):
    _close(_of(outcomes, "full-rank"), _of(outcomes, "plain"), 2e-5)


def test_projection_is_lossy_without_its_adaptations_and_keeps_them(outcomes):
    plain, lossy = _of(outcomes, "plain")[0]["losses"], _of(outcomes, "lossy")[0]["losses"]
    assert abs(plain[0] - lossy[0]) > 1e-5
    first, last = _of(outcomes, "projection")
    assert first["writers"] < 1e-6 < 0.1 < last["writers"], "only the stage before the link is projected"
    np.testing.assert_array_equal(first["anchors"], last["anchors"])
    np.testing.assert_allclose(first["outside"], first["anchors"], atol=1e-6)


def test_both_directions_carry_rank_numbers_a_token(outcomes):
    for whole, small in zip(_of(outcomes, "plain"), _of(outcomes, "reparametrised"), strict=True):
        assert set(whole["sent"]) == {HIDDEN}
        assert set(small["sent"]) == {RANK}
        assert small["sent"][RANK] * HIDDEN == whole["sent"][HIDDEN] * RANK
        assert small["counted"] == small["sent"][RANK]
    assert set(_of(outcomes, "reparametrised-uncompressed")[0]["sent"]) == {HIDDEN}


def test_an_exported_model_goes_on_in_its_subspace_only(outcomes):
    same, whole, refusal = _of(outcomes, "exported")[0]
    np.testing.assert_allclose(same, whole, rtol=1e-6)
    assert "parallel.stage_links.kind='reparametrised' would lose" in refusal


PROJECTION = {"kind": "projection", "rank": RANK}
PEERS = {"rendezvous": "127.0.0.1:1", "token_file": "token", "replica": "a"}


@pytest.mark.parametrize(
    "overrides,says",
    [
        ({"parallel__stage_links": {"kind": "projection"}}, "rank"),
        ({"parallel__stage_links": PROJECTION}, "compresses no boundary of parallel.pipeline=1"),
        ({"parallel__pipeline": 2, "parallel__stage_links": {**PROJECTION, "rank": 33}}, "1..hidden_size=32"),
        ({"parallel__pipeline": 2, "parallel__stage_links": {**PROJECTION, "slow": [1]}}, "must be below 1"),
        (
            {"parallel__pipeline": 2, "parallel__tensor": 2, "parallel__stage_links": PROJECTION},
            "cannot be joined with parallel.tensor=2",
        ),
        (
            {"parallel__pipeline": 2, "parallel__stage_links": PROJECTION, "model__tie_embeddings": True},
            "needs a model with an output matrix of its own",
        ),
        (
            {"parallel__pipeline": 2, "parallel__stage_links": PROJECTION, "model__adapter": {"kind": "lora"}},
            "cannot be joined with model.adapter.kind=lora",
        ),
        (
            {"parallel__pipeline": 2, "parallel__stage_links": PROJECTION, "model__freeze": ["*mlp*"]},
            "cannot be joined with model.freeze",
        ),
        (
            {
                "parallel__pipeline": 2,
                "parallel__stage_links": PROJECTION,
                "sync": {"kind": "diloco", "overlap": "delayed", "peers": PEERS},
            },
            "cannot be joined with sync.overlap=delayed",
        ),
        (
            {
                "parallel__pipeline": 2,
                "parallel__stage_links": {"kind": "reparametrised", "rank": 4, "free_layers": 2},
            },
            "must be at most 1, the layers behind the last compressed boundary",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_the_start(tmp_path, overrides, says):
    write_text(tmp_path / "text", 2)
    with pytest.raises(ConfigError, match=says):
        check_run(validate(tiny_tree(tmp_path, **overrides)), 4)
