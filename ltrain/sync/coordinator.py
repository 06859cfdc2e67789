"""What the rendezvous service decides: who is in the run, and which contributions make up a round.

Pure state, no sockets and no clock: every method takes what happened and returns the messages to send. The
record of a round is the round: all replicas apply exactly the contributions that it lists; every replica that
was on time holds them already when the record is written.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

from ltrain.sync.open_round import Member, OpenRound, Rank, RankId, WaitPolicy, majority

_NUDGE_S = 1.0


class Send(NamedTuple):
    """A message to send; to every process when `to` is None."""

    to: RankId | None
    kind: str
    fields: dict[str, Any]


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
        self._open = OpenRound()
        self._nudged = 0.0

    # Membership.

    def hello(self, who: RankId, message: dict[str, Any]) -> list[Send]:
        """A process that `refusal` accepts wants in: add it, and start its replica when it is complete."""
        self.fields = message["fields"]
        self.shards |= message["shards"]
        member = self.members.setdefault(who.replica, Member(message["num_ranks"]))
        member.ranks[who.rank] = Rank(
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
            self._open = OpenRound()
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
        reference = majority(states)
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
        self._open.arrived(who, message, now)
        return self.check(now)

    def have(self, who: RankId, message: dict[str, Any], now: float) -> list[Send]:
        """A process holds the frame of a shard from another replica."""
        if message["round"] != self.round:
            return []
        self._open.have(who, message)
        return self.check(now)

    def bad(self, who: RankId, message: dict[str, Any], now: float) -> list[Send]:
        """A process refused a frame: its sender is left out of this round, with the reason."""
        if message["round"] != self.round:
            return []
        self._open.bad(who, message)
        return self.check(now)

    def check(self, now: float) -> list[Send]:
        """Close the round if everyone is there, or the deadline has passed; also called now and then."""
        first = self._open.first_arrival
        if self.round is None or first is None:
            return []
        present = self._open.present(self.shards)
        missing = self._open.missing(present, self.members)
        self._open.note_complete(present, missing, now)
        if not present:
            return []
        late = [n for n in self._expected() if n not in present and not self._open.rejected(n)]
        if (missing or late) and now < first + self.policy.wait_s(self.lateness):
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
                {"round": self.round, "replica": sender, "frames": self._open.arrivals[sender].frames},
            )
            for sender, receiver in sorted(missing)
            for rank in self.members[receiver].ranks
        ]

    def _commit(self, present: list[str], missing: set[tuple[str, str]], now: float) -> list[Send]:
        """Close the round: its record, and where everyone goes on."""
        closed, expected = self._open, self._expected()
        settled = closed.settle(present, missing, expected, self.members)
        self.lateness.extend(closed.lateness(expected, now))
        record = {
            "round": self.round,
            "included": {name: closed.arrivals[name].frames for name in settled.included},
            "excluded": settled.excluded,
            "on_time": settled.on_time,
            "diverged": settled.diverged,
            "plan": self.planner(closed.notes(settled.on_time)) if self.planner is not None else None,
        }
        assert self.round is not None
        self.round += 1
        for name in settled.on_time:
            if self.members[name].complete:
                self.members[name].at = self.round
        self._open = OpenRound()
        sends = [Send(None, "commit", record)]
        for name, arrival in sorted(closed.arrivals.items()):
            # Who had sent its frames but cannot follow at once goes on with all its ranks together.
            if name not in settled.on_time and name not in settled.diverged:
                for rank in sorted(arrival.notes):
                    sends += self.synced(RankId(name, rank))
        return sends
