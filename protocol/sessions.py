"""Credits and fences: who may still send how much, and who is too old to be heard. Pure state, no sockets or clocks."""

from __future__ import annotations

from collections import OrderedDict

SCAN = 64
"""Sessions looked at when an idle one has to make room."""

MAX_RUNS = 256
"""Runs whose fences are remembered."""


class Session:
    """What one connection has sent. `credit` is cumulative: the number of requests it may have sent in all."""

    __slots__ = ("finished", "identity", "key", "received", "running", "window")

    def __init__(self, identity: bytes, key: str, window: int) -> None:
        self.identity = identity
        self.key = key
        self.window = window
        self.received = 0  # counted requests, refused ones included
        self.finished = 0  # of these, the ones that have got their last reply
        self.running = 0  # unfinished requests that needed credit

    @property
    def credit(self) -> int:
        return self.finished + self.window


class Sessions:
    """The sessions of a server: a connection's identity bound to the server's nonce. At most `maximum`.

    A session that is forgotten and opened again gets another key, by which its client sees that counting restarted.
    """

    def __init__(self, nonce: str, window: int, maximum: int) -> None:
        self._nonce = nonce
        self._window = window
        self._maximum = maximum
        self._opened = 0
        self._sessions: OrderedDict[bytes, Session] = OrderedDict()

    def __len__(self) -> int:
        return len(self._sessions)

    def of(self, identity: bytes) -> Session | None:
        """The session of this connection, opened if need be; None when all places are taken by busy ones."""
        session = self._sessions.get(identity)
        if session is not None:
            self._sessions.move_to_end(identity)
            return session
        if len(self._sessions) >= self._maximum and not self._evict():
            return None
        self._opened += 1
        session = self._sessions[identity] = Session(identity, f"{self._nonce}.{self._opened}", self._window)
        return session

    def _evict(self) -> bool:
        for identity, session in list(zip(self._sessions, self._sessions.values(), strict=True))[:SCAN]:
            if session.received == session.finished:
                del self._sessions[identity]
                return True
        return False


class Fences:
    """Highest term and incarnation seen of each run. 0 means `not stated` and is never refused; so is the run ''."""

    def __init__(self) -> None:
        self._highest: OrderedDict[str, tuple[int, int]] = OrderedDict()

    def check(self, run: str, term: int, incarnation: int) -> tuple[str, bool]:
        """(why the sender is too old, or ''; whether its term is a new highest one)."""
        if not run or not (term or incarnation):
            return "", False
        high_term, high_incarnation = self._highest.get(run, (0, 0))
        if term and term < high_term:
            return f"term {term} of run {run!r} is over, {high_term} is in office", False
        if incarnation and incarnation < high_incarnation:
            return f"incarnation {incarnation} of run {run!r} is over, {high_incarnation} lives", False
        self._highest[run] = (max(term, high_term), max(incarnation, high_incarnation))
        self._highest.move_to_end(run)
        if len(self._highest) > MAX_RUNS:
            self._highest.popitem(last=False)
        return "", term > high_term
