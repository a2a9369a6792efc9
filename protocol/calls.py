"""Requests at a server: their replies until acknowledged, their order of service, and cancels that came too early.

Pure state: the shell in server.py owns tasks, sockets and clocks, and passes the time in.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from typing import TYPE_CHECKING, NamedTuple

from protocol.codec import Payload
from protocol.errors import ProtocolError

if TYPE_CHECKING:
    from protocol.handling import Route
    from protocol.sessions import Session


class Reply(NamedTuple):
    """One numbered reply, kept as packed body (or error) so that it can be sent again under another session."""

    seq: int
    kind: str  # reply | done | error
    payload: Payload | ProtocolError

    @property
    def nbytes(self) -> int:
        return self.payload.nbytes + 64 if isinstance(self.payload, tuple) else 512


class Request:
    """One request id at the server, from its first arrival until its last reply is acknowledged or forgotten."""

    __slots__ = (
        "blocked_at", "body", "deadline", "finished_at", "id", "identity", "incarnation", "next_seq", "replies",
        "route", "run", "session", "task", "term", "timer", "trace",
    )  # fmt: skip

    def __init__(self, request_id: str, route: Route, session: Session, deadline: float) -> None:
        self.id = request_id
        self.route = route
        self.session = session  # the one that pays
        self.identity = session.identity  # the one that is answered: the newest that asked
        self.deadline = deadline
        self.body: object = None
        self.run = self.trace = ""
        self.term = self.incarnation = 0
        self.next_seq = 0
        self.replies: deque[Reply] = deque()  # not acknowledged
        self.blocked_at = 0  # first reply that its peer could not take yet
        self.finished_at: float | None = None
        self.task: asyncio.Task[None] | None = None
        self.timer: asyncio.TimerHandle | None = None

    @property
    def first_held(self) -> int:
        """Lowest reply number that can still be sent again."""
        return self.replies[0].seq if self.replies else self.next_seq


class Calls:
    """All requests a server knows, within `max_bytes` of unacknowledged replies and `max_finished` finished requests.

    Beyond the bounds the oldest finished requests are forgotten first; then running ones lose the replies they hold.
    """

    def __init__(self, max_bytes: int, max_finished: int, keep_s: float) -> None:
        self._max_bytes = max_bytes
        self._max_finished = max_finished
        self._keep_s = keep_s
        self.bytes = 0
        self.lost_replies = 0
        self.known: dict[str, Request] = {}
        self.finished: OrderedDict[str, Request] = OrderedDict()

    def add(self, request: Request) -> None:
        self.known[request.id] = request

    def append(self, request: Request, kind: str, payload: Payload | ProtocolError) -> Reply:
        """Number and hold a reply."""
        reply = Reply(request.next_seq, kind, payload)
        request.next_seq += 1
        request.replies.append(reply)
        self.bytes += reply.nbytes
        if self.bytes > self._max_bytes:
            self._make_room(request)
        return reply

    def finish(self, request: Request, now: float) -> None:
        """Hold a finished request for resends until it is acknowledged or expires."""
        request.finished_at = now
        request.body = None
        self.finished[request.id] = request
        while len(self.finished) > self._max_finished:
            self.forget(next(iter(self.finished.values())))

    def forget(self, request: Request) -> None:
        if self.known.get(request.id) is request:
            del self.known[request.id]
        self.finished.pop(request.id, None)
        self._drop_replies(request)

    def acknowledge(self, request_id: str, count: int) -> None:
        """The client has the first `count` replies. A finished request that is acknowledged in full is forgotten."""
        request = self.known.get(request_id)
        if request is None:
            return
        while request.replies and request.replies[0].seq < count:
            self.bytes -= request.replies.popleft().nbytes
        if request.finished_at is not None and count >= request.next_seq:
            self.forget(request)

    def expire(self, now: float) -> None:
        """Forget what finished more than `keep_s` ago."""
        while self.finished:
            oldest = next(iter(self.finished.values()))
            if oldest.finished_at is not None and oldest.finished_at + self._keep_s > now:
                return
            self.forget(oldest)

    def _make_room(self, newest: Request) -> None:
        while self.bytes > self._max_bytes and self.finished:
            self.forget(next(iter(self.finished.values())))
        if self.bytes > self._max_bytes:
            for request in [r for r in self.known.values() if r is not newest and r.replies]:
                self.lost_replies += len(request.replies)
                self._drop_replies(request)
                if self.bytes <= self._max_bytes:
                    return
            while self.bytes > self._max_bytes and len(newest.replies) > 1:
                self.lost_replies += 1
                self.bytes -= newest.replies.popleft().nbytes

    def _drop_replies(self, request: Request) -> None:
        self.bytes -= sum(reply.nbytes for reply in request.replies)
        request.replies.clear()


class Waiting:
    """Requests that wait for a free place: higher priority first, then first come, first served."""

    def __init__(self) -> None:
        self._by_priority: dict[int, OrderedDict[str, Request]] = {}
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def push(self, request: Request) -> None:
        queue = self._by_priority.get(request.route.priority)
        if queue is None:
            queue = self._by_priority[request.route.priority] = OrderedDict()
            self._by_priority = dict(sorted(self._by_priority.items(), reverse=True))
        queue[request.id] = request
        self._size += 1

    def remove(self, request: Request) -> bool:
        queue = self._by_priority.get(request.route.priority)
        if queue is None or queue.get(request.id) is not request:
            return False
        del queue[request.id]
        self._size -= 1
        return True

    def pop(self) -> Request | None:
        for queue in self._by_priority.values():
            if queue:
                self._size -= 1
                return queue.popitem(last=False)[1]
        return None


class Tombstones:
    """Ids whose cancel came before the request, or whose request was cancelled: `maximum` of them, for `keep_s`."""

    def __init__(self, maximum: int, keep_s: float) -> None:
        self._maximum = maximum
        self._keep_s = keep_s
        self._until: OrderedDict[str, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._until)

    def add(self, request_id: str, now: float) -> None:
        self._until[request_id] = now + self._keep_s
        self._until.move_to_end(request_id)
        if len(self._until) > self._maximum:
            self._until.popitem(last=False)

    def covers(self, request_id: str, now: float) -> bool:
        return self._until.get(request_id, 0.0) > now

    def expire(self, now: float) -> None:
        while self._until:
            request_id, until = next(iter(self._until.items()))
            if until > now:
                return
            del self._until[request_id]
