"""What `ltrain plan` does, with plain values."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from ltrain.config.base import ConfigError
from ltrain.planner.baselines import balanced_squares_s, static_plan
from ltrain.planner.cluster import ClusterSpec
from ltrain.planner.cost import CostModel
from ltrain.planner.explain import comparison_table, plan_table, to_text
from ltrain.planner.gantt import draw
from ltrain.planner.kinds import degrees_up_to
from ltrain.planner.mixes import mix
from ltrain.planner.plan import Plan
from ltrain.planner.solve import plan_batch


def run(
    *,
    cluster_path: str | Path,
    cost: CostModel | dict[str, Any],
    lengths: Sequence[int] | None = None,
    lengths_path: str | Path | None = None,
    mix_name: str | None = None,
    num_sequences: int = 512,
    max_length: int | None = None,
    seed: int = 0,
    out_png: str | Path | None = None,
    out_json: str | Path | None = None,
    world_size: int | None = None,
    options: dict[str, Any] | None = None,
    out: TextIO | None = None,
) -> int:
    """Plan one batch, print the plan and its rivals, and write a picture and JSON where asked. Exit code 0,
    or 2 on bad input with the message on standard error.

    The batch is `lengths`, the file of `lengths_path` (JSON list, or one length per line), or `num_sequences`
    drawn from the mix `mix_name`, capped at `max_length` (default: what the largest group holds). `cost` is a
    CostModel or its keyword arguments; `options` go to `plan_batch`.
    """
    out = out or sys.stdout
    try:
        cluster = ClusterSpec.from_file(cluster_path)
        if world_size is not None:
            cluster.check_world(world_size)
        model = cost if isinstance(cost, CostModel) else _cost(cost)
        batch = _batch(cluster, model, lengths, lengths_path, mix_name, num_sequences, max_length, seed)
        plan = plan_batch(batch, cluster, model, **(options or {}))
        rows = compare(plan, cluster, model)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    out.write(to_text(plan_table(plan), comparison_table(rows, sum(batch))))
    out.write(f"planned in {plan.solve_s:.2f} s\n")
    if out_png is not None:
        draw(plan, out_png)
        out.write(f"wrote {out_png}\n")
    if out_json is not None:
        Path(out_json).write_text(plan.to_json() + "\n")
        out.write(f"wrote {out_json}\n")
    return 0


def compare(plan: Plan, cluster: ClusterSpec, cost: CostModel) -> list[tuple[str, float]]:
    """Step seconds of the plan, and of each rival policy that can run this batch.

    The best static degree is the best over all degrees for this one batch, which is also what a
    batch-adaptive single degree reaches; a static run must keep the degree that its longest document needs,
    which is named too.
    """
    rows = [("plan", plan.predicted_s)]
    static: dict[int, float] = {}
    for degree in degrees_up_to(cluster.num_devices, "powers_of_two"):
        try:
            static[degree] = static_plan(plan.lengths, cluster, cost, degree).predicted_s
        except ConfigError:
            continue
    if static:
        best = min(static, key=lambda degree: static[degree])
        widest = max(static)
        rows.append((f"static, degree {widest} (holds the longest document possible)", static[widest]))
        rows.append((f"one degree for the batch, degree {best} (best static, batch-adaptive)", static[best]))
    if len(cluster.islands) == 1:
        rows.append(
            (
                "balanced squared lengths (as Megatron's hybrid CP)",
                balanced_squares_s(plan.lengths, cluster, cost),
            )
        )
    return rows


def _cost(values: dict[str, Any]) -> CostModel:
    try:
        return CostModel(**values)
    except TypeError as error:
        raise ConfigError(
            "cost", sorted(values), f"does not name the cost model's fields ({error})"
        ) from None


def _batch(
    cluster: ClusterSpec,
    cost: CostModel,
    lengths: Sequence[int] | None,
    lengths_path: str | Path | None,
    mix_name: str | None,
    num_sequences: int,
    max_length: int | None,
    seed: int,
) -> list[int]:
    given = [
        name
        for name, value in (("lengths", lengths), ("lengths_path", lengths_path), ("mix", mix_name))
        if value
    ]
    if len(given) != 1:
        raise ConfigError(
            "lengths", given, "or a mix must be given, and only one of them", "use --lengths or --mix"
        )
    if mix_name is not None:
        room = sum(
            tokens * island.size
            for tokens, island in zip(cost.tokens_by_island(cluster), cluster.islands, strict=True)
        )
        return mix(mix_name).draw(num_sequences, min(max_length or room, room), seed)
    if lengths is not None:
        return [int(length) for length in lengths]
    return read_lengths(str(lengths_path))


def read_lengths(path: str) -> list[int]:
    """Lengths from a JSON list or from lines. Raises ConfigError on anything else."""
    try:
        text = Path(path).read_text()
    except OSError as error:
        raise ConfigError("lengths", path, f"can't be read ({error.strerror})") from None
    try:
        values = json.loads(text) if text.lstrip().startswith("[") else text.split()
        return [int(value) for value in values]
    except (ValueError, TypeError):
        raise ConfigError("lengths", path, "must hold whole numbers: a JSON list, or one per line") from None
