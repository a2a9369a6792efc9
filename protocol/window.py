"""A client's view of its session: what it has sent, what it may send, and what it has asked. Pure state."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from enum import Enum, auto

from protocol.codec import ReplyHeader
from protocol.errors import ErrorCode

FIRST_CREDIT = 64
"""Requests a client may send before it has heard how many it may."""

SIMPLE_WINDOW = 512
"""Open requests at a server without credits. A plain ROUTER drops what exceeds its queue, by default 1000 messages."""

MAX_PROBES = 64
"""Probes whose answers are remembered to be due."""


class Change(Enum):
    """What a reply's header has told about the session."""

    NOTHING = auto()
    CREDIT = auto()  # more may be sent
    RESTARTED = auto()  # the server counts from 0 again, and no probe that would sort it out is under way


@dataclass(slots=True)
class Probe:
    """A `session` message on its way: requests counted before it, its place among all messages, and when."""

    sent: int
    order: int
    at: float


class Window:
    """Session, cumulative credit and unanswered probes of one client.

    `simple`: the server has answered and knows no sessions; then SIMPLE_WINDOW limits the client.
    """

    def __init__(self) -> None:
        self.session = ""
        self.simple = False
        self.sent = 0  # counted requests of this session
        self.credit: int | None = FIRST_CREDIT
        self._order = 0
        self._probes: OrderedDict[str, Probe] = OrderedDict()

    def allows(self, in_flight: int) -> bool:
        """Whether one more request may be sent while `in_flight` are without their last reply."""
        if self.simple:
            return in_flight < SIMPLE_WINDOW
        return self.credit is None or self.sent < self.credit

    def note_request(self, counted: bool) -> int:
        """A request was sent; returns its place among all messages."""
        self.sent += counted
        self._order += 1
        return self._order

    def note_probe(self, probe_id: str, now: float) -> None:
        self._order += 1
        self._probes[probe_id] = Probe(self.sent, self._order, now)
        if len(self._probes) > MAX_PROBES:
            self._probes.popitem(last=False)

    def asked_since(self, when: float) -> bool:
        """Whether an unanswered probe was sent after `when`."""
        return any(probe.at > when for probe in self._probes.values())

    def forget_probes(self) -> None:
        self._probes.clear()

    def is_probe(self, reply_id: str) -> bool:
        return reply_id in self._probes

    def hear(self, header: ReplyHeader) -> Change:
        """Learn from the header of any reply."""
        if header.session and header.session != self.session:
            return self._enter(header)
        if header.session:
            if header.credit is not None and (self.credit is None or header.credit > self.credit):
                self.credit = header.credit
                return Change.CREDIT
        elif not self.session and not (header.error and header.error.code == ErrorCode.OVERLOADED):
            self.simple, self.credit = True, None
            return Change.CREDIT
        return Change.NOTHING

    def _enter(self, header: ReplyHeader) -> Change:
        restarted, self.session = bool(self.session), header.session
        self.simple = False
        self.credit = header.credit
        if not restarted:
            return Change.CREDIT
        # The server has got what was sent since the connection was made anew, and that began with a probe.
        first = next(iter(self._probes.values()), None)
        base = self.sent if first is None else first.sent
        self._correct(-base)
        return Change.RESTARTED if first is None else Change.CREDIT

    def answered(self, header: ReplyHeader, accepted: int | None) -> Probe:
        """A probe's answer: count anew from the requests the server has received (None: it knows no sessions).

        Earlier probes will not be answered any more. The returned probe's `order` tells what was sent before it.
        """
        probe = self._probes[header.id]
        while self._probes.popitem(last=False)[1] is not probe:
            continue
        if accepted is not None:
            self._correct(accepted - probe.sent)
            self.credit = header.credit
        elif not header.session:
            self.session, self.simple, self.credit = "", True, None
        return probe

    def _correct(self, by: int) -> None:
        self.sent += by
        for probe in self._probes.values():
            probe.sent += by
