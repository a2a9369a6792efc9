"""Which rollout servers there are, what they serve, and which gets the next request. Pure: time comes in as argument.

INVARIANTS
- An unknown replica gets no work; a silent, unready or failed one none until it answers and its back-off ends.
- Samples in flight at a replica never exceed its capacity, but for one larger request, which runs alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from protocol.messages import UNVERSIONED, Version

BACKOFF_FIRST_S = 0.5
BACKOFF_MAX_S = 30.0


@dataclass
class Replica:
    """One rollout server. `failures`: requests failed in a row; `blocked_until`: end of its back-off (seconds)."""

    name: str
    address: str
    capacity: int
    context_tokens: int
    version: Version = UNVERSIONED
    ready: bool = False
    in_flight: int = 0
    failures: int = 0
    blocked_until: float = 0.0
    last_seen: float = 0.0


@dataclass
class Membership:
    """The authority on who serves. silent_s: after so many seconds without a sign of life a replica gets no work."""

    silent_s: float
    rng: random.Random = field(default_factory=lambda: random.Random(0))
    replicas: dict[str, Replica] = field(default_factory=dict)

    def hello(self, name: str, address: str, capacity: int, context_tokens: int, now: float) -> Replica:
        """A replica registers, or says that it is still there. A new address under a known name replaces it."""
        replica = self.replicas.get(name)
        if replica is None or replica.address != address:
            replica = self.replicas[name] = Replica(name, address, capacity, context_tokens)
        replica.capacity, replica.context_tokens, replica.last_seen = capacity, context_tokens, now
        return replica

    def seen(self, name: str, version: Version, *, ready: bool, now: float) -> bool:
        """An `info` of the replica arrived. True: it may take work now that it could not take before."""
        replica = self.replicas[name]
        before = (replica.version, replica.ready, now - replica.last_seen <= self.silent_s)
        replica.version, replica.ready, replica.last_seen = version, ready, now
        return before != (version, ready, True)

    def failed(self, replica: Replica, now: float) -> None:
        """A request failed there: exponential back-off with jitter before it gets work again.

        Requests that fail while it backs off already died of the same cause and count as one.
        """
        if now < replica.blocked_until:
            return
        replica.failures += 1
        pause = min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2 ** min(replica.failures - 1, 16))
        replica.blocked_until = now + pause * self.rng.uniform(0.5, 1.0)

    def succeeded(self, replica: Replica) -> None:
        replica.failures, replica.blocked_until = 0, 0.0

    def usable(self, replica: Replica, incarnation: int, now: float) -> bool:
        """Whether it would take work now, with weights on the lineage."""
        return (
            replica.ready
            and replica.version.incarnation == incarnation
            and now - replica.last_seen <= self.silent_s
            and now >= replica.blocked_until
        )

    def pick(
        self,
        samples: int,
        *,
        incarnation: int,
        fresh: Callable[[int], bool],
        prefer: str | None,
        now: float,
        held: frozenset[str] | set[str] = frozenset(),
    ) -> Replica | None:
        """The replica for a request of `samples` completions: the preferred one if it has room, else the least loaded.

        `fresh(step)`: whether weights of that step will do. held: replicas that somebody before it in the line waits
        for. None: nobody can take it now.
        """
        able = [
            replica
            for replica in self.replicas.values()
            if replica.name not in held
            and self.usable(replica, incarnation, now)
            and fresh(replica.version.step)
            and (replica.in_flight == 0 or replica.in_flight + samples <= replica.capacity)
        ]
        if not able:
            return None
        for replica in able:
            if replica.name == prefer:
                return replica
        return min(able, key=lambda replica: (replica.in_flight / replica.capacity, replica.name))

    def next_unblock(self, now: float) -> float | None:
        """Earliest end of a back-off (seconds), for the shell's timer."""
        times = [replica.blocked_until for replica in self.replicas.values() if replica.blocked_until > now]
        return min(times, default=None)
