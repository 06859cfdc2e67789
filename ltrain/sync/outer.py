"""The state between rounds: global parameters, error buffers, outer momentum; the two halves of a round."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
from torch import Tensor

from ltrain.config.sync import DiLoCo, SparseLoCo
from ltrain.sync.aggregate import aggregate, gain_corrected_rate
from ltrain.sync.compress import compress, sparse_values
from ltrain.sync.payload import Payload


class OuterState:
    """Global parameters theta, error buffers e and outer momentum m of the tensors that this rank owns.

    `parameters` maps a name to a local tensor: a whole parameter, a tensor-parallel or pipeline shard, or a
    flat piece of the distributed optimizer's float32 parameters; whatever it is, the ranks that own the same
    piece in other replicas pass the same names and shapes. Tensors are updated in place.

    One round (arXiv 2508.15706, algorithm 1): `contribute` forms delta = theta - local, a = decay e + delta,
    sends Q(TopK(a)) and keeps e = a - sent; `apply` moves theta by the aggregated contributions and copies it
    to the parameters.

    adapts: this replica changes its parameters between `reset_parameters` and its next step, and says so by
    `restart` (`ltrain.train.stage_links`): the start of the local steps is then kept apart from theta.
    """

    def __init__(
        self, config: DiLoCo | SparseLoCo, parameters: dict[str, Tensor], *, adapts: bool = False
    ) -> None:
        self.config, self.adapts = config, adapts
        self.parameters = dict(sorted(parameters.items()))
        self.round = 0
        self.density = config.density if isinstance(config, SparseLoCo) else 1.0
        self.bits: int = config.bits
        self.theta = {name: _copy(p) for name, p in self.parameters.items()}
        # Where the current inner steps started: theta, but for delayed updates and adapted replicas.
        apart = self.delayed or adapts
        self.start = {name: _copy(p) for name, p in self.parameters.items()} if apart else self.theta
        self.error: dict[str, Tensor] = {}
        if isinstance(config, SparseLoCo):
            self.error = {name: torch.zeros_like(p) for name, p in self.theta.items()}
        self.momentum: dict[str, Tensor] = {}
        if isinstance(config, DiLoCo) and config.outer_momentum:
            self.momentum = {name: torch.zeros_like(p) for name, p in self.theta.items()}
        self._sent: dict[str, Payload] = {}
        self.norms: dict[str, float] = {}

    @property
    def delayed(self) -> bool:
        return self.config.overlap == "delayed"

    @torch.no_grad()
    def contribute(self) -> dict[str, Payload]:
        """The payloads of this round, by name; error buffers keep what they leave out.

        Raises ValueError when a parameter is not finite, before any state changes.
        """
        for name, p in self.parameters.items():
            if not bool(torch.isfinite(p).all()):
                raise ValueError(f"parameter {name} must be finite to be sent to other replicas")
        squares = {"drift": 0.0, "theta": 0.0, "residual": 0.0}
        self._sent = {}
        for name, p in self.parameters.items():
            # The parameter may be narrower than theta; its own rounding is not progress.
            delta = self.start[name].to(p.dtype).to(torch.float32) - p.detach().to(torch.float32)
            squares["drift"] += _square(delta)
            squares["theta"] += _square(self.theta[name])
            self._sent[name] = self._compress(name, delta)
            if name in self.error:
                squares["residual"] += _square(self.error[name])
            if self.delayed:
                # Own progress is kept: the next steps start where theta and this progress put them.
                self.start[name].copy_(self.theta[name] - delta)
                p.copy_(self.start[name])
        drift = math.sqrt(squares["drift"] / squares["theta"]) if squares["theta"] else 0.0
        self.norms = {"drift": drift, "residual_norm": math.sqrt(squares["residual"])}
        return self._sent

    def _compress(self, name: str, delta: Tensor) -> Payload:
        config = self.config
        if isinstance(config, DiLoCo):
            return compress(delta, density=1.0, bits=config.bits)
        error = self.error[name]
        error.mul_(config.error_decay).add_(delta)
        square = config.blocks == "square"
        payload = compress(error, density=self.density, bits=self.bits, chunk=config.chunk, square=square)
        positions, values = sparse_values(payload)
        flat = error.view(-1)
        flat[positions] = flat[positions] - values
        return payload

    @torch.no_grad()
    def missed(self) -> None:
        """This rank's contribution was not part of its round: return the configured share of it to e."""
        share = self.config.restore_missed if isinstance(self.config, SparseLoCo) else 0.0
        if share:
            for name, payload in self._sent.items():
                positions, values = sparse_values(payload)
                flat = self.error[name].view(-1)
                flat[positions] = flat[positions] + values * share
        self._sent = {}

    @torch.no_grad()
    def apply(self, contributions: dict[str, dict[str, Payload]]) -> dict[str, float]:
        """Move theta by the contributions of a round, {replica: {name: payload}}, and count the round.

        No contributions leave theta as it is. The parameters are not touched: `reset_parameters` follows, or,
        with delayed updates, the next `contribute`. Returns the mean outer rate and overlap.
        """
        rates, overlaps = [], []
        for name, theta in self.theta.items():
            if contributions:
                rate, overlap = self._step(name, theta, {r: c[name] for r, c in contributions.items()})
                rates.append(rate)
                overlaps.append(overlap)
        self._sent = {}
        self.round += 1
        mean = len(rates) or 1
        return {"outer_lr": sum(rates) / mean, "overlap": sum(overlaps) / mean}

    def _step(self, name: str, theta: Tensor, payloads: dict[str, Payload]) -> tuple[float, float]:
        config = self.config
        if isinstance(config, SparseLoCo):
            seen = aggregate(payloads, config.aggregation, config.clip_to_median, theta.device)
            rate = config.outer_lr
            if config.gain is not None:
                rate = gain_corrected_rate(
                    seen, config.aggregation, config.gain, config.error_decay, config.max_outer_lr
                )
            theta.sub_(seen.update.mul_(rate))
            return rate, seen.overlap
        seen = aggregate(payloads, "mean", False, theta.device)
        rate = config.outer_lr if config.gain is None else config.gain * (1.0 - config.outer_momentum)
        update = seen.update
        if config.outer_momentum:
            momentum = self.momentum[name]
            momentum.mul_(config.outer_momentum).add_(update)
            update = update + momentum * config.outer_momentum if config.nesterov else momentum.clone()
        theta.sub_(update.mul_(rate))
        return rate, seen.overlap

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start the next inner steps from theta."""
        for name, p in self.parameters.items():
            p.copy_(self.theta[name])
            if self.start is not self.theta:
                self.start[name].copy_(self.theta[name])

    @torch.no_grad()
    def restart(self) -> None:
        """Measure the next pseudo-gradient from the parameters as they are now, theta staying as it is."""
        assert self.adapts
        for name, p in self.parameters.items():
            self.start[name].copy_(p)

    @torch.no_grad()
    def take_parameters(self) -> None:
        """Make the parameters as they are now the global ones."""
        for name, p in self.parameters.items():
            self.theta[name].copy_(p)
            if self.start is not self.theta:
                self.start[name].copy_(p)

    def digest(self) -> str:
        """SHA-256 over theta, in order of name: equal on all replicas after every round."""
        return digest_of(self.theta)

    def global_state(self) -> dict[str, Tensor]:
        """The part that all replicas share: theta and momentum, by prefixed name."""
        shared = {f"theta/{name}": tensor for name, tensor in self.theta.items()}
        return shared | {f"momentum/{name}": tensor for name, tensor in self.momentum.items()}

    @torch.no_grad()
    def load_global_state(self, tensors: dict[str, Tensor], round_: int) -> None:
        """Take theta and momentum of another replica, and its round. Error buffers stay."""
        for name, tensor in self.global_state().items():
            tensor.copy_(tensors[name])
        self.round = round_
        self.reset_parameters()
        self._sent = {}

    def state_dict(self) -> dict[str, Any]:
        """Everything a bitwise resume needs beside the parameters themselves."""
        state: dict[str, Any] = {"round": self.round, "density": self.density, "bits": self.bits}
        for group in ("theta", "error", "momentum"):
            state[group] = {name: tensor.clone() for name, tensor in getattr(self, group).items()}
        if self.start is not self.theta:
            state["start"] = {name: tensor.clone() for name, tensor in self.start.items()}
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back a `state_dict`. Raises ValueError where names or shapes differ."""
        groups = ["theta", "error", "momentum"] + (["start"] if self.start is not self.theta else [])
        for group in groups:
            mine, theirs = getattr(self, group), state[group]
            if set(mine) != set(theirs):
                odd = sorted(set(mine) ^ set(theirs))
                raise ValueError(f"sync state: {group} of {odd[0]} is on one side only")
            for name, tensor in mine.items():
                if tensor.shape != theirs[name].shape:
                    raise ValueError(
                        f"sync state: {group} of {name} has shape {tuple(theirs[name].shape)}, "
                        f"expected {tuple(tensor.shape)}"
                    )
        for group in groups:
            for name, tensor in getattr(self, group).items():
                tensor.copy_(state[group][name])
        self.round, self.density, self.bits = int(state["round"]), float(state["density"]), int(state["bits"])


def _copy(p: Tensor) -> Tensor:
    return p.detach().to(torch.float32, copy=True).contiguous()


def _square(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64) ** 2)


def digest_of(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over the bytes of float32 tensors in order of name."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(name.encode())
        total.update(tensors[name].cpu().contiguous().view(-1).numpy())
    return total.hexdigest()
