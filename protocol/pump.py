"""One ZeroMQ socket in an asyncio loop, without a task or a future per message.

INVARIANT: libzmq's file descriptor is edge-triggered and any call on the socket may consume its edge. So the socket is
drained until it says EAGAIN whenever the descriptor fires, and looked at once more after every send.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

import zmq

from protocol.codec import COPY_BYTES, Buffer

log = logging.getLogger(__name__)

BATCH = 64
"""Messages handled before other tasks of the loop get their turn."""


class Pump:
    """Calls `on_message(frames)` for every message that arrives, and `on_writable()` when asked to by `want_write`.

    Neither callback may raise. Belongs to the running loop; `close` closes the socket too.
    """

    def __init__(
        self,
        socket: zmq.Socket[bytes],
        on_message: Callable[[list[zmq.Frame]], None],
        on_writable: Callable[[], None] | None = None,
    ) -> None:
        self._socket = socket
        self._on_message = on_message
        self._on_writable = on_writable
        self._loop = asyncio.get_running_loop()
        self._fd = int(socket.getsockopt(zmq.FD))  # pyright: ignore[reportArgumentType]
        self._kicked = False
        self.want_write = False
        self.closed = False
        self._loop.add_reader(self._fd, self._drain)
        self.kick()

    def kick(self) -> None:
        """Look at the socket again in the next turn of the loop."""
        if not self._kicked and not self.closed:
            self._kicked = True
            self._loop.call_soon(self._drain)

    def send(self, parts: Sequence[Buffer]) -> None:
        """Send one message without blocking. Raises zmq.Again or another zmq.ZMQError; then nothing of it was sent."""
        socket, last = self._socket, len(parts) - 1
        for i, part in enumerate(parts):
            size = len(part) if isinstance(part, bytes) else part.nbytes
            socket.send(part, zmq.NOBLOCK if i == last else zmq.NOBLOCK | zmq.SNDMORE, copy=size < COPY_BYTES)
        self.kick()

    def _drain(self) -> None:
        self._kicked = False
        socket = self._socket
        for _ in range(BATCH):
            if self.closed:
                return
            try:
                frame = socket.recv(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                break
            frames = [frame]
            while frame.more:
                frame = socket.recv(zmq.NOBLOCK, copy=False)
                frames.append(frame)
            self._on_message(frames)
        else:
            self.kick()
        if self.want_write and not self.closed and self._on_writable is not None:
            if int(socket.getsockopt(zmq.EVENTS)) & zmq.POLLOUT:  # pyright: ignore[reportArgumentType]
                self.want_write = False
                self._on_writable()

    async def stop_listening(self, timeout_s: float) -> None:
        """Unbind, and wait until the address is free; connections stay."""
        if self.closed:
            return
        freed = asyncio.Event()
        monitor = Pump(
            self._socket.get_monitor_socket(zmq.EVENT_CLOSED | zmq.EVENT_CLOSE_FAILED), lambda _: freed.set()
        )
        try:
            self._socket.unbind(self._socket.getsockopt(zmq.LAST_ENDPOINT).rstrip(b"\0"))  # pyright: ignore
            async with asyncio.timeout(timeout_s):
                await freed.wait()
        except (TimeoutError, zmq.ZMQError) as error:
            log.warning("an address may still be in use: %s", error or "ZeroMQ has not freed it in time")
        finally:
            monitor.close(0)
            self._socket.disable_monitor()

    def close(self, linger_ms: int) -> None:
        if not self.closed:
            self.closed = True
            self._loop.remove_reader(self._fd)
            self._socket.close(linger_ms)
