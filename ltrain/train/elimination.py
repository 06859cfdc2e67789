"""What a run builds for token elimination, and the commands that prepare it: `ltrain fit-predictor` and
`ltrain calibrate-elimination`.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ltrain.config.base import ConfigError
from ltrain.config.elimination import BlockElimination, NoElimination, PredictorScorer
from ltrain.config.schema import RunConfig
from ltrain.elimination import scorers
from ltrain.elimination.fit import Fit, FitSettings, recall, run_fit
from ltrain.elimination.inputs import LayerInputs
from ltrain.elimination.predictor import (
    PredictorShape,
    check_predictor,
    load_predictor,
    new_predictor,
    save_predictor,
    token_blocks,
)
from ltrain.elimination.ratios import resolve_ratios
from ltrain.elimination.runtime import Elimination
from ltrain.elimination.sequence import BlockedSequence
from ltrain.model.spec import ModelSpec

log = logging.getLogger("ltrain")

# Bytes of each weight file that enter a fingerprint: all of its header, and some weights.
_SAMPLE = 1 << 20


def model_identity(config: RunConfig, spec: ModelSpec) -> str:
    """A hash of the model that a run starts from: its shape, and its weights' files or its seed."""
    digest = hashlib.sha256()
    facts: list[object] = [spec.family, spec.hidden_size, spec.num_layers, spec.num_heads, spec.num_kv_heads]
    facts += [spec.head_dim, spec.ffn_hidden_size, spec.vocab_size]
    if spec.source is None:
        facts.append(config.run.seed)
    else:
        for file in sorted(spec.source.glob("*.safetensors")):
            with file.open("rb") as data:
                facts.append((file.name, file.stat().st_size, hashlib.sha256(data.read(_SAMPLE)).hexdigest()))
    digest.update(repr(facts).encode())
    return digest.hexdigest()[:16]


def check_run_elimination(config: RunConfig, spec: ModelSpec) -> None:
    """Raise ConfigError where elimination doesn't fit the model; nothing is built."""
    section = config.elimination
    if not isinstance(section, BlockElimination):
        return
    blocks = config.train.seq_len // _block(config, section)
    smallest = min(resolve_ratios(section, spec.num_layers))
    if smallest * blocks < section.strata:
        raise ConfigError(
            "elimination.strata",
            section.strata,
            f"leaves less than a block a stratum of {blocks} blocks at ratio {smallest:g}",
            "use fewer strata, smaller blocks or a larger ratio",
        )
    if section.mode == "q" and spec.o_bias:
        rule = "would add the output's bias to tokens that don't attend"
        raise ConfigError("elimination.mode", "q", rule, "take qkv, layer or backward")
    if isinstance(section.scorer, PredictorScorer):
        check_predictor(section.scorer.path, **_fits(config, spec))


def build_elimination(config: RunConfig, spec: ModelSpec) -> Elimination | None:
    """Token elimination of the run, if it has any."""
    section = config.elimination
    if not isinstance(section, BlockElimination):
        return None
    scorer: scorers.Scorer
    if isinstance(section.scorer, PredictorScorer):
        scorer = load_predictor(section.scorer.path, **_fits(config, spec))
    else:
        scorer = scorers.from_config(section.scorer)
    return Elimination(
        section,
        resolve_ratios(section, spec.num_layers),
        scorer,
        block=_block(config, section),
        steps=config.train.steps,
        seed=config.run.seed,
    )


def _block(config: RunConfig, section: BlockElimination) -> int:
    return section.block or config.parallel.context.block


def _fits(config: RunConfig, spec: ModelSpec) -> dict[str, Any]:
    section = config.elimination
    assert isinstance(section, BlockElimination)
    identity = model_identity(config, spec)
    return {"fingerprint": identity, "block": _block(config, section), "num_layers": spec.num_layers}


def fit_predictor(config: RunConfig, *, steps: int, out: Path | None, settings: FitSettings) -> int:
    """Train the predictor of `config`'s model on its data, one row a step, and write it.

    The model is frozen and in evaluation. Raises ConfigError where the configuration has no block size to
    fit to, or spreads the model over ranks.
    """
    from ltrain.parallel.mesh import init_process_group
    from ltrain.train.build import build_run
    from ltrain.train.main import set_seed

    section = config.elimination
    if not isinstance(section, BlockElimination):
        rule = "must be blocks: the predictor is fitted to its blocks"
        raise ConfigError("elimination.kind", section.kind, rule)
    if out is None:
        if not isinstance(section.scorer, PredictorScorer):
            raise ConfigError("--out", "(missing)", "must be given where the scorer is not `predictor`")
        out = section.scorer.path
    _one_rank(config, "fit-predictor")
    block = _block(config, section)
    plain = config.model_copy(update={"elimination": NoElimination()})
    init_process_group(config.train.timeout_s)
    set_seed(config.run.seed)
    fit_to_run(build_run(plain), block, steps=steps, out=out, settings=settings)
    dist.destroy_process_group()
    return 0


def fit_to_run(run: Any, block: int, *, steps: int, out: Path, settings: FitSettings) -> None:
    """Train the predictor of a run's model on the run's rows, from where it stands, and write it."""
    spec, config = run.spec, run.config
    shape = PredictorShape(spec.num_layers, spec.hidden_size, spec.num_heads, block)
    if spec.hidden_size % spec.num_heads:
        raise ConfigError("model.hidden_size", spec.hidden_size, f"must divide by {spec.num_heads} heads")
    layers = new_predictor(shape).to(run.mesh.device)
    fit = Fit(layers, settings)
    losses = run_fit(fit, _rows(run, block), steps)
    found = _held_recall(run, block, layers)
    facts = {"steps": steps, "first_loss": losses[0], "last_loss": losses[-1], "recall_at_0.4": found}
    save_predictor(layers, shape, out, fingerprint=model_identity(config, spec), facts=facts)
    count = sum(p.numel() for p in layers.parameters())
    log.info("predictor in %s: %d parameters, loss %.4f to %.4f", out, count, losses[0], losses[-1])
    log.info("recall of the best 0.4 of the blocks on another row: %.3f (chance 0.4)", found)


def _rows(run: Any, block: int) -> Iterator[Callable[[Callable[[LayerInputs], None]], None]]:
    """Forward passes over the run's rows, each of which hands every layer's inputs to a function."""
    while True:
        for batch in run.assignment.batches(run.loader.next_step().rows):
            yield lambda give, batch=batch: forward_layers(run, batch, block, give)


def forward_layers(run: Any, batch: Any, block: int, give: Callable[[LayerInputs], None]) -> None:
    """Run a micro-batch through the model in evaluation; `give` sees what each layer's scorer would see."""
    context = batch.context
    sequence = BlockedSequence.of(context.layout, block, context.doc_ids, context.targets)

    def before(layer: Any, args: Any, kwargs: Any) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        give(
            LayerInputs(
                x=x.detach(), norm=layer.input_layernorm, attention=layer.self_attention, context=context,
                sequence=sequence, layer=layer.layer_number - 1, step=0, seed=0,
            )
        )  # fmt: skip

    handles = [
        layer.register_forward_pre_hook(before, with_kwargs=True) for layer in run.model.decoder.layers
    ]
    run.model.eval()
    try:
        with torch.no_grad():
            run.model(
                input_ids=batch.tokens, position_ids=None, attention_mask=None, packed_seq_params=context
            )
    finally:
        for handle in handles:
            handle.remove()


def _held_recall(run: Any, block: int, layers: Any) -> float:
    """Mean over layers of the recall on one more row."""
    layers.eval()
    found: list[float] = []

    def give(inputs: LayerInputs) -> None:
        truth = scorers.lemo_target(inputs, causal=False).sum(0)
        found.append(recall(layers[inputs.layer].pairs(token_blocks(inputs)).sum(0), truth))

    next(_rows(run, block))(give)
    return sum(found) / len(found)


def _one_rank(config: RunConfig, command: str) -> None:
    parallel = config.parallel
    degrees = {
        "tensor": parallel.tensor,
        "pipeline": parallel.pipeline,
        "context.degree": parallel.context.degree,
    }
    for name, degree in degrees.items():
        if degree > 1:
            raise ConfigError(
                f"parallel.{name}", degree, f"must be 1 for {command}", f"add --parallel.{name} 1"
            )
