"""A client's side of one request: the replies that came and have not been read, and how it ended."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping, Sequence

from protocol.codec import Buffer, Payload, ReplyHeader
from protocol.errors import ProtocolError


class Pending:
    """One request until its last reply has been read or it was given up."""

    __slots__ = (
        "deadline", "error", "expected", "final", "gap_at", "id", "items", "kind", "order", "origin", "overflowed",
        "payload", "progress_at", "retry", "sent", "timer", "waiter",
    )  # fmt: skip

    def __init__(self, request_id: str, kind: str, payload: Payload, deadline: float) -> None:
        self.id = request_id
        self.kind = kind
        self.payload = payload
        self.deadline = deadline
        self.origin: Mapping[str, object] = {}
        self.expected = 0  # replies taken in
        self.items: deque[tuple[ReplyHeader, Sequence[Buffer]]] = deque()
        self.waiter: asyncio.Future[None] | None = None
        self.error: ProtocolError | None = None  # local end: deadline, closed client
        self.final = False  # the last reply is in `items`
        self.order = 0  # place of the last sending among all
        self.sent = False  # else it is in a queue or waits for `retry`
        self.gap_at = -1  # `expected` when a lost reply was noticed last
        self.overflowed = False
        self.progress_at = 0.0
        self.timer: asyncio.TimerHandle | None = None
        self.retry: asyncio.TimerHandle | None = None

    def wake(self) -> None:
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)

    def fail(self, error: ProtocolError) -> None:
        """End it here, unless its last reply has come."""
        if not self.final and self.error is None:
            self.error = error
            self.wake()

    async def next(self) -> tuple[ReplyHeader, Sequence[Buffer]]:
        """The next reply, with its frames. Raises the local end once all replies before it were read."""
        while not self.items:
            if self.error is not None:
                raise self.error
            self.waiter = asyncio.get_running_loop().create_future()
            await self.waiter
        return self.items.popleft()
