"""A counter that grows with every change, and a bounded wait for the next: what `info`'s long poll is made of."""

from __future__ import annotations

import asyncio
import contextlib

from protocol.messages import InfoRequest


class Revision:
    """Belongs to one event loop. `value` starts at 0."""

    def __init__(self) -> None:
        self.value = 0
        self._changed = asyncio.Event()

    def bump(self) -> None:
        """Something that `info` tells has changed; whoever waits is woken."""
        self.value += 1
        self._changed.set()
        self._changed = asyncio.Event()

    async def wait(self, request: InfoRequest) -> None:
        """Until the value differs from `request.known`, or `request.wait_ms` passed; at once without `known`."""
        if request.known != self.value or request.wait_ms == 0:
            return
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), request.wait_ms / 1000)
