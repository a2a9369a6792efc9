"""Frames between the server and its engine child: length-prefixed MessagePack over a socket pair.

A socket pair, because its end is the other side's death: EOF arrives the moment the last holder is gone.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import Any

import msgpack

MAX_FRAME_BYTES = 256 << 20
_LENGTH = struct.Struct("<I")


class Link:
    """One end. `recv` returns None when the other side is gone; `send` to a dead side raises ConnectionError."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def over(cls, sock: socket.socket) -> Link:
        return cls(*await asyncio.open_connection(sock=sock))

    async def send(self, message: dict[str, Any]) -> None:
        self.post(message)
        await self._writer.drain()

    def post(self, message: dict[str, Any]) -> None:
        """Send without waiting for room; for small messages from places that cannot await."""
        frame = msgpack.packb(message) or b""
        self._writer.write(_LENGTH.pack(len(frame)) + frame)

    async def recv(self) -> dict[str, Any] | None:
        try:
            (size,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
            if size > MAX_FRAME_BYTES:
                raise ConnectionError(f"frame of {size} bytes from the engine link")
            return msgpack.unpackb(await self._reader.readexactly(size))
        except (asyncio.IncompleteReadError, ConnectionError):
            return None

    def close(self) -> None:
        self._writer.close()
