"""The result of planning: micro-batches of groups, each with its sequences, predicted time and memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ltrain.config.base import ConfigError

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Group:
    """Ranks that work on the same sequences in one micro-batch.

    `sequences` are indices into the batch, in packed order; `schedule` says how the ranks exchange ("local"
    for one rank); `weights` are the members' shares of every packed stream, in rank order; `num_tokens` and
    `capacity` are of the whole group.
    """

    ranks: tuple[int, ...]
    sequences: tuple[int, ...]
    predicted_s: float
    schedule: str = "local"
    num_tokens: int = 0
    capacity: int = 0
    weights: tuple[float, ...] = ()

    @property
    def degree(self) -> int:
        return len(self.ranks)

    @property
    def peak_tokens(self) -> float:
        """Tokens of the fullest member before its shard is rounded to blocks."""
        return self.num_tokens * (max(self.weights) if self.weights else 1.0 / self.degree)

    @property
    def fill(self) -> float:
        """Share of the group's memory for tokens that is used."""
        return self.num_tokens / self.capacity if self.capacity else 0.0


@dataclass(frozen=True)
class Plan:
    """Micro-batches, run one after another; inside one, groups run at the same time on disjoint ranks.

    `predicted_s` is the sum over micro-batches of the slowest group. `lower_bound_s` is proven: no assignment
    of the same micro-batches to groups is faster under the cost model. `step_bound_s` holds for any division
    into micro-batches. `notes` say what did not go as asked (a solver out of time, a fall-back). `solve_s` is
    wall time, and no part of the plan's identity.
    """

    micro_batches: tuple[tuple[Group, ...], ...]
    predicted_s: float
    lower_bound_s: float
    step_bound_s: float
    lengths: tuple[int, ...]
    num_devices: int
    solver: str
    notes: tuple[str, ...] = ()
    solve_s: float = field(default=0.0, compare=False)

    @property
    def gap(self) -> float:
        """predicted_s over lower_bound_s, less 1."""
        return self.predicted_s / self.lower_bound_s - 1.0 if self.lower_bound_s > 0 else 0.0

    @property
    def tokens_per_s(self) -> float:
        return sum(self.lengths) / self.predicted_s if self.predicted_s > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        data = asdict(self)
        del data["solve_s"]
        return {"schema": SCHEMA_VERSION, **data}

    def to_json(self) -> str:
        """The plan as one JSON document; equal plans give equal text."""
        return json.dumps(self.to_dict(), separators=(",", ":"))

    @property
    def digest(self) -> str:
        """SHA-256 of the JSON: ranks compare it before they act on a plan."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that `to_json` wrote, checked. Raises ConfigError on anything else."""
        try:
            data = json.loads(text)
            if data.pop("schema") != SCHEMA_VERSION:
                raise ValueError("another schema version")
            micro_batches = tuple(
                tuple(_read_group(group) for group in groups) for groups in data.pop("micro_batches")
            )
            plan = cls(
                micro_batches,
                lengths=tuple(int(length) for length in data.pop("lengths")),
                notes=tuple(str(note) for note in data.pop("notes")),
                **data,
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(
                "plan", text[:60], f"is not a plan of schema {SCHEMA_VERSION} ({error})"
            ) from None
        plan.validate()
        return plan

    def validate(self, lengths: Sequence[int] | None = None) -> None:
        """Raise ConfigError unless the plan can be run: every sequence exactly once, ranks disjoint, memory
        kept."""
        if lengths is not None and tuple(lengths) != self.lengths:
            raise ConfigError("plan.lengths", len(self.lengths), "must be the lengths of the batch")
        seen: list[int] = []
        for index, groups in enumerate(self.micro_batches):
            name = f"plan.micro_batches[{index}]"
            ranks = [rank for group in groups for rank in group.ranks]
            if len(set(ranks)) != len(ranks) or any(not 0 <= rank < self.num_devices for rank in ranks):
                raise ConfigError(name, ranks, f"must use each of {self.num_devices} ranks at most once")
            for group in groups:
                seen += group.sequences
                if not group.sequences or not group.ranks:
                    raise ConfigError(name, group, "must have no group without ranks or sequences")
                if any(not 0 <= sequence < len(self.lengths) for sequence in group.sequences):
                    raise ConfigError(name, group.sequences, f"must name sequences below {len(self.lengths)}")
                if sum(self.lengths[sequence] for sequence in group.sequences) != group.num_tokens:
                    raise ConfigError(name, group.num_tokens, "must be the tokens of the group's sequences")
                if group.num_tokens > group.capacity:
                    raise ConfigError(name, group.num_tokens, f"must fit the group's {group.capacity} tokens")
                if len(group.weights) != group.degree or abs(sum(group.weights) - 1.0) > 1e-9:
                    raise ConfigError(name, group.weights, "must be one share a rank, with sum 1")
        if sorted(seen) != list(range(len(self.lengths))):
            raise ConfigError(
                "plan.sequences", len(seen), f"must be each of {len(self.lengths)} exactly once"
            )

    def explain(self) -> str:
        """The plan as a table in plain text."""
        from ltrain.planner.explain import plan_table, to_text

        return to_text(plan_table(self))


def _read_group(data: dict[str, Any]) -> Group:
    return Group(
        ranks=tuple(int(rank) for rank in data["ranks"]),
        sequences=tuple(int(sequence) for sequence in data["sequences"]),
        predicted_s=float(data["predicted_s"]),
        schedule=str(data["schedule"]),
        num_tokens=int(data["num_tokens"]),
        capacity=int(data["capacity"]),
        weights=tuple(float(weight) for weight in data["weights"]),
    )
