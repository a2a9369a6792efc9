"""What a room sees of the wire: limits, routes, and the running call that a handler is given."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from protocol.calls import Request
from protocol.codec import encode
from protocol.errors import CancelledRequestError
from protocol.messages import Body
from protocol.outbox import Outbox

B = TypeVar("B", bound=Body)

YIELD_EVERY = 16
"""Replies of one request after which its handler gives other tasks a turn."""


class Call:
    """One running request, as its handler sees it."""

    __slots__ = ("_outbox", "_request")

    def __init__(self, outbox: Outbox, request: Request) -> None:
        self._outbox = outbox
        self._request = request

    @property
    def id(self) -> str:
        return self._request.id

    @property
    def kind(self) -> str:
        return self._request.route.kind

    @property
    def run(self) -> str:
        return self._request.run

    @property
    def term(self) -> int:
        return self._request.term

    @property
    def incarnation(self) -> int:
        return self._request.incarnation

    @property
    def trace(self) -> str:
        return self._request.trace

    @property
    def remaining_s(self) -> float:
        """Seconds until this request's deadline, on this machine's monotonic clock; never negative."""
        return max(0.0, self._request.deadline - asyncio.get_running_loop().time())

    async def reply(self, body: Body) -> None:
        """Send a numbered intermediate reply. Its arrays must not change afterwards. Never waits for the peer."""
        request = self._request
        if request.finished_at is not None:
            raise CancelledRequestError(f"request {request.id} has ended")
        sent = self._outbox.reply(request, "reply", encode(body))
        if not sent or request.next_seq % YIELD_EVERY == 0:
            await asyncio.sleep(0)


Handler = Callable[[Call, B], Awaitable[Body]]
"""Its result is the `done` reply; a ProtocolError becomes the `error` reply, any other exception `internal`."""


@dataclass(frozen=True, slots=True)
class Route(Generic[B]):
    """What serves one kind. Higher priority first; control routes need no credit and no free place."""

    kind: str
    body_type: type[B]
    handler: Handler[B]
    priority: int = 0
    control: bool = False


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """Maxima of one server."""

    max_message_bytes: int = 64 << 20  # soft: beyond it a message is answered with `invalid`
    max_header_bytes: int = 16 << 20  # soft, too: of the header frame
    hard_frame_bytes: int = 256 << 20  # ZeroMQ drops the connection that sends a larger frame
    max_frames: int = 65536  # after the header
    window: int = 1024  # unfinished requests per session that need credit
    max_concurrent: int = 512  # running handlers of routes that are not control
    max_queued: int = 4096  # requests waiting for a place
    max_control: int = 1024  # running handlers of control routes
    max_sessions: int = 4096
    replay_bytes: int = 256 << 20  # unacknowledged replies of all requests together
    replay_s: float = 60.0  # finished requests are kept so long for resends
    ack_grace_s: float = 0.5  # how long `close` waits for the last replies to be acknowledged
    max_finished: int = 16384
    max_tombstones: int = 16384
    peer_queue: int = 4096  # messages ZeroMQ queues per peer and direction
    retry_after_ms: int = 100  # what `overloaded` tells clients
