"""Places for running samples: a lower class goes first, within a class whoever came first.

INVARIANTS: never more than `capacity` places taken; a free place is never withheld from a waiting sample while open;
a cancelled waiter loses nothing but its turn.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
from collections.abc import AsyncGenerator
from enum import IntEnum

from protocol.errors import OverloadedError

RETRY_AFTER_MS = 500


class SampleClass(IntEnum):
    """Refinements first: they hold a whole prompt's work and are what training waits for."""

    REFINE = 0
    DRAFT = 1
    GENERATE = 2


class Admission:
    """Belongs to one event loop. Closed, it grants nothing new; what runs goes on."""

    def __init__(self, capacity: int, max_waiting: int) -> None:
        self._capacity = capacity
        self._max_waiting = max_waiting
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []
        self._gone = 0  # waiters that were cancelled and still lie in the heap
        self._arrivals = itertools.count()
        self._closed_by: set[str] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self.running = 0

    @property
    def waiting(self) -> int:
        return len(self._waiting) - self._gone

    def check_room(self, samples: int) -> None:
        """Raises OverloadedError if so many more samples may not wait."""
        if self.waiting + samples > self._max_waiting:
            detail = f"{self.waiting} samples wait already, {samples} more exceed {self._max_waiting}"
            raise OverloadedError(detail, retry_after_ms=RETRY_AFTER_MS)

    @contextlib.asynccontextmanager
    async def place(self, order: SampleClass) -> AsyncGenerator[None]:
        """Wait for a place and hold it."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (order, next(self._arrivals), future))
        self._grant()
        try:
            await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                self._release()  # granted and cancelled in the same turn
            else:
                self._gone += 1
            raise
        try:
            yield
        finally:
            self._release()

    def close(self, by: str) -> None:
        """Grant nothing until every `by` that closed has opened again."""
        self._closed_by.add(by)

    def open(self, by: str) -> None:
        self._closed_by.discard(by)
        self._grant()

    async def idle(self, timeout_s: float) -> bool:
        """Wait until nothing runs; False if that takes longer."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        return self.running == 0

    def _grant(self) -> None:
        while self._waiting and not self._closed_by and self.running < self._capacity:
            _, _, future = heapq.heappop(self._waiting)
            if future.done():
                self._gone -= 1
                continue
            future.set_result(None)
            self.running += 1
            self._idle.clear()

    def _release(self) -> None:
        self.running -= 1
        if self.running == 0:
            self._idle.set()
        self._grant()
