"""What the rendezvous service decides: who is in the run, and which contributions make up a round.

Pure state, no sockets and no clock: every method takes what happened and returns the messages to send. The
record of a round is the round: all replicas apply exactly the contributions that it lists; every replica that
was on time holds them already when the record is written.
"""

from __future__ import annotations

import statistics
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

_NUDGE_S = 1.0


class RankId(NamedTuple):
    """A process: the name of its replica and its rank there."""

    replica: str
    rank: int


class Send(NamedTuple):
    """A message to send; to every process when `to` is None."""

    to: RankId | None
    kind: str
    fields: dict[str, Any]


@dataclass
class _Rank:
    host: str
    port: int
    shards: dict[str, str]
    round: int
    digests: dict[str, str]


@dataclass
class Member:
    """A replica: its connected ranks, and the round that it is in (None until it holds the run's state)."""

    num_ranks: int
    ranks: dict[int, _Rank] = field(default_factory=dict)
    at: int | None = None
    waiting: set[int] = field(default_factory=set)

    @property
    def complete(self) -> bool:
        return len(self.ranks) == self.num_ranks


@dataclass
class _Arrival:
    frames: dict[str, str] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    ranks: set[int] = field(default_factory=set)
    complete_at: float | None = None
    rejected: str = ""


@dataclass(frozen=True)
class WaitPolicy:
    """How long a round stays open after the first replica is ready: median + factor x MAD of the lateness."""

    min_s: float
    max_s: float
    factor: float

    def wait_s(self, lateness: deque[float]) -> float:
        """Seconds to wait; the longest wait until four values are known."""
        if len(lateness) < 4:
            return self.max_s
        median = statistics.median(lateness)
        deviation = statistics.median(abs(value - median) for value in lateness)
        return min(self.max_s, max(self.min_s, median + self.factor * deviation))


Planner = Callable[[dict[str, list[dict[str, Any]]]], dict[str, Any] | None]


class Coordinator:
    """The state of one run. Not thread-safe: the service calls it under a lock."""

    def __init__(self, num_replicas: int, policy: WaitPolicy, planner: Planner | None = None) -> None:
        self.num_replicas, self.policy, self.planner = num_replicas, policy, planner
        self.members: dict[str, Member] = {}
        self.round: int | None = None
        self.fields: dict[str, str] | None = None
        self.shards: dict[str, str] = {}
        self.lateness: deque[float] = deque(maxlen=64)
        self.first_arrival: float | None = None
        self._arrivals: dict[str, _Arrival] = {}
        # (sender, shard) -> digest held, by receiving process.
        self._held: dict[tuple[str, str], dict[RankId, str]] = {}
        self._notes: dict[RankId, dict[str, Any]] = {}
        self._nudged = 0.0

    # Membership.

    def hello(self, who: RankId, message: dict[str, Any]) -> list[Send]:
        """A process that `refusal` accepts wants in: add it, and start its replica when it is complete."""
        self.fields = message["fields"]
        self.shards |= message["shards"]
        member = self.members.setdefault(who.replica, Member(message["num_ranks"]))
        member.ranks[who.rank] = _Rank(
            message["host"], message["port"], message["shards"], message["round"], message["digests"]
        )
        sends = [self._peers()]
        if member.complete:
            member.at, member.waiting = None, set()
            sends += self._try_start() if self.round is None else self._enter(who.replica)
        return sends

    def refusal(self, who: RankId, message: dict[str, Any]) -> tuple[str, object, object] | None:
        """(field, theirs, ours) of the first thing in which a process differs from the run, or None."""
        if self.fields is not None:
            for name in sorted(self.fields.keys() | message["fields"].keys()):
                mine, theirs = self.fields.get(name), message["fields"].get(name)
                if mine != theirs:
                    return name, theirs, mine
        for shard, digest in message["shards"].items():
            if self.shards.get(shard, digest) != digest:
                return f"tensors of shard {shard}", digest, self.shards[shard]
        member = self.members.get(who.replica)
        if member is not None and member.num_ranks != message["num_ranks"]:
            return "number of ranks", message["num_ranks"], member.num_ranks
        if not 0 <= who.rank < message["num_ranks"]:
            return "rank", who.rank, f"0..{message['num_ranks'] - 1}"
        return None

    def lost(self, who: RankId) -> list[Send]:
        """A process is gone. Its contribution stays in the round if all others hold it."""
        member = self.members.get(who.replica)
        if member is None:
            return []
        member.ranks.pop(who.rank, None)
        member.at, member.waiting = None, set()
        if not member.ranks:
            del self.members[who.replica]
        sends = [self._peers()]
        if self.round is not None and not self._expected():
            # Nobody holds the state of the run any more: those that waited for it cannot get it.
            reason = "all replicas that held the state of the run have left; resume from a checkpoint"
            sends += [
                Send(RankId(n, r), "error", {"reason": reason})
                for n, m in self.members.items()
                for r in m.ranks
            ]
            self.round = None
            self._clear_round()
            if not self.members:
                self.fields, self.shards = None, {}
        return sends

    def _peers(self) -> Send:
        ranks = [
            {"replica": name, "rank": r, "host": rank.host, "port": rank.port, "shards": sorted(rank.shards)}
            for name, member in sorted(self.members.items())
            for r, rank in sorted(member.ranks.items())
        ]
        return Send(None, "peers", {"ranks": ranks})

    def _try_start(self) -> list[Send]:
        ready = {name: member for name, member in self.members.items() if member.complete}
        if len(ready) < self.num_replicas:
            return []
        rounds = {name: min(rank.round for rank in member.ranks.values()) for name, member in ready.items()}
        self.round = max(rounds.values())
        states = {name: self._state(member) for name, member in ready.items() if rounds[name] == self.round}
        reference = _majority(states)
        sends = []
        for name, member in ready.items():
            in_sync = states.get(name) == states[reference]
            member.at = self.round if in_sync else None
            sends += self._tell_start(name, None if in_sync else reference)
        return sends

    @staticmethod
    def _state(member: Member) -> tuple[tuple[str, str], ...]:
        return tuple(sorted({pair for rank in member.ranks.values() for pair in rank.digests.items()}))

    def _enter(self, name: str) -> list[Send]:
        """A complete replica enters a run that is under way: it fetches the state from one that holds it."""
        sources = [other for other in sorted(self._expected()) if other != name]
        if not sources:
            reason = "no replica holds the state of the run; resume from a checkpoint"
            return [Send(RankId(name, r), "error", {"reason": reason}) for r in self.members[name].ranks]
        # Spread over the sources: several may join at once.
        return self._tell_start(name, sources[sum(map(ord, name)) % len(sources)])

    def _tell_start(self, name: str, source: str | None) -> list[Send]:
        fields = {"round": self.round, "source": source}
        return [Send(RankId(name, rank), "start", fields) for rank in self.members[name].ranks]

    def resync(self, who: RankId) -> list[Send]:
        """A process cannot follow the records: give it a source for the whole state."""
        member = self.members.get(who.replica)
        if member is None or not member.complete or self.round is None:
            return []
        member.at = None
        return self._enter(who.replica)

    def synced(self, who: RankId) -> list[Send]:
        """A process holds a state of the run. When all of its replica do, they go on to the open round."""
        member = self.members.get(who.replica)
        if member is None or self.round is None:
            return []
        member.waiting.add(who.rank)
        if len(member.waiting) < member.num_ranks:
            return []
        member.waiting = set()
        member.at = self.round
        return [Send(RankId(who.replica, rank), "go", {"round": self.round}) for rank in member.ranks]

    def _expected(self) -> list[str]:
        return [name for name, m in self.members.items() if m.complete and m.at == self.round]

    # Rounds.

    def arrived(self, who: RankId, message: dict[str, Any], now: float) -> list[Send]:
        """A process has sent its frames of a round: {shard: digest}."""
        if self.round is None or who.replica not in self.members:
            return []
        if message["round"] < self.round:
            # Late: it catches up with the records that it has been sent, all its ranks to the same round.
            return self.synced(who)
        if message["round"] > self.round:
            return []
        arrival = self._arrivals.setdefault(who.replica, _Arrival())
        arrival.frames |= message["frames"]
        arrival.digests |= message["digests"]
        arrival.ranks.add(who.rank)
        self._notes[who] = message["notes"]
        if self.first_arrival is None:
            self.first_arrival = now
        return self.check(now)

    def have(self, who: RankId, message: dict[str, Any], now: float) -> list[Send]:
        """A process holds the frame of a shard from another replica."""
        if message["round"] != self.round:
            return []
        self._held.setdefault((message["replica"], message["shard"]), {})[who] = message["sha"]
        return self.check(now)

    def bad(self, who: RankId, message: dict[str, Any], now: float) -> list[Send]:
        """A process refused a frame: its sender is left out of this round, with the reason."""
        if message["round"] != self.round:
            return []
        arrival = self._arrivals.setdefault(message["replica"], _Arrival())
        arrival.rejected = f"{message['reason']} (seen by {who.replica})"
        return self.check(now)

    def check(self, now: float) -> list[Send]:
        """Close the round if everyone is there, or the deadline has passed; also called now and then."""
        if self.round is None or self.first_arrival is None:
            return []
        present = self._present()
        missing = self._missing(present)
        for name in present:
            if not any(name == sender for sender, _ in missing):
                arrival = self._arrivals[name]
                arrival.complete_at = arrival.complete_at or now
        if not present:
            return []
        late = [name for name in self._expected() if name not in present and not self._rejected(name)]
        deadline = self.first_arrival + self.policy.wait_s(self.lateness)
        if (missing or late) and now < deadline:
            return self._nudge(missing, now)
        return self._commit(present, missing, now)

    def _nudge(self, missing: set[tuple[str, str]], now: float) -> list[Send]:
        """Tell receivers what they lack: a push may have been lost, or sent before a replica came in."""
        if not missing or now < self._nudged + _NUDGE_S:
            return []
        self._nudged = now
        return [
            Send(
                RankId(receiver, rank),
                "missing",
                {"round": self.round, "replica": sender, "frames": self._arrivals[sender].frames},
            )
            for sender, receiver in sorted(missing)
            for rank in self.members[receiver].ranks
        ]

    def _rejected(self, name: str) -> bool:
        return name in self._arrivals and bool(self._arrivals[name].rejected)

    def _present(self) -> list[str]:
        """Replicas whose frames of all shards are announced and not refused."""
        return sorted(
            name
            for name, arrival in self._arrivals.items()
            if arrival.frames.keys() == self.shards.keys() and not arrival.rejected
        )

    def _missing(self, present: list[str]) -> set[tuple[str, str]]:
        """(sender, receiver) pairs whose frames have not all come through."""
        missing = set()
        for sender in present:
            for receiver in present:
                member = self.members.get(receiver)
                if receiver == sender or member is None or not member.complete:
                    continue
                for rank, info in member.ranks.items():
                    for shard in info.shards:
                        held = self._held.get((sender, shard), {}).get(RankId(receiver, rank))
                        if held != self._arrivals[sender].frames[shard]:
                            missing.add((sender, receiver))
        return missing

    def _commit(self, present: list[str], missing: set[tuple[str, str]], now: float) -> list[Send]:
        excluded = {name: a.rejected for name, a in self._arrivals.items() if a.rejected}
        diverged = self._diverged(present)
        excluded |= dict.fromkeys(diverged, "parameters differ from those of the other replicas")
        missing = {pair for pair in missing if not excluded.keys() & set(pair)}
        while missing:
            # Leave out whoever is part of most transfers that did not come through, senders first.
            counts = Counter(name for pair in missing for name in pair)
            senders = {sender for sender, _ in missing}
            worst = max(sorted(counts), key=lambda name: (counts[name], name in senders))
            excluded[worst] = "its frames, or those for it, were not through by the deadline"
            missing = {pair for pair in missing if worst not in pair}
        included = [name for name in present if name not in excluded]
        # Whoever received everything can follow at once, even when its own frames were left out.
        on_time = [
            name for name in present
            if name not in diverged and not self._missing_for(name, included)
        ]  # fmt: skip
        on_time += [n for n in self._expected() if self._rejected(n) and not self._missing_for(n, included)]
        self._learn_lateness(now)
        plan = self._make_plan(on_time) if self.planner is not None else None
        record = {
            "round": self.round,
            "included": {name: self._arrivals[name].frames for name in included},
            "excluded": dict(sorted(excluded.items())),
            "on_time": sorted(on_time),
            "diverged": diverged,
            "plan": plan,
        }
        assert self.round is not None
        self.round += 1
        for name in on_time:
            if name in self.members and self.members[name].complete:
                self.members[name].at = self.round
        sends = [Send(None, "commit", record)]
        for name, arrival in sorted(self._arrivals.items()):
            # Who had sent its frames but cannot follow at once goes on with all its ranks together.
            if name not in on_time and name not in diverged:
                for rank in sorted(arrival.ranks):
                    sends += self.synced(RankId(name, rank))
        self._clear_round()
        return sends

    def _make_plan(self, names: list[str]) -> dict[str, Any] | None:
        notes = {
            name: [self._notes[RankId(name, rank)] for rank in sorted(self._arrivals[name].ranks)]
            for name in names
            if name in self._arrivals
        }
        return self.planner(notes) if self.planner is not None else None

    def _missing_for(self, receiver: str, included: list[str]) -> bool:
        member = self.members.get(receiver)
        if member is None:
            return True
        return any(
            self._held.get((sender, shard), {}).get(RankId(receiver, rank))
            != self._arrivals[sender].frames[shard]
            for sender in included
            if sender != receiver
            for rank, info in member.ranks.items()
            for shard in info.shards
        )

    def _diverged(self, present: list[str]) -> list[str]:
        states = {
            n: tuple(sorted(self._arrivals[n].digests.items())) for n in present if self._arrivals[n].digests
        }
        if len(set(states.values())) < 2:
            return []
        reference = states[_majority(states)]
        return sorted(name for name, state in states.items() if state != reference)

    def _learn_lateness(self, now: float) -> None:
        assert self.first_arrival is not None
        waited = now - self.first_arrival
        for name in self._expected():
            complete = self._arrivals[name].complete_at if name in self._arrivals else None
            # Who did not make it would have needed longer: let the next rounds wait somewhat more.
            self.lateness.append(complete - self.first_arrival if complete is not None else 1.5 * waited)

    def _clear_round(self) -> None:
        self._arrivals, self._held, self.first_arrival = {}, {}, None


def _majority(states: dict[str, Any]) -> str:
    """The first name, in order, that holds the most common state."""
    counts = Counter(states.values())
    return min(states, key=lambda name: (-counts[states[name]], name))
