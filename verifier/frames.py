"""What a worker process and the pool say to each other: length-prefixed MessagePack of typed structs. No pickle.

A frame is 4 bytes of big-endian length and that many bytes of MessagePack. The first frame of a worker is Ready;
then each Task is answered by one Outcome.
"""

from __future__ import annotations

import os
from typing import Literal

from msgspec import Struct

MAX_FRAME_BYTES = 1 << 20
"""More than any task may hold; a longer length means that the stream is broken."""

HEADER_BYTES = 4


class Settings(Struct, frozen=True):
    """Limits of a worker process; its only argument, as JSON."""

    soft_limit_s: float
    hard_limit_s: float
    memory_limit_mb: int
    parent_pid: int


class Ready(Struct, frozen=True):
    """The worker has imported its graders. isolated: it has no network."""

    pid: int
    isolated: bool


class Task(Struct, frozen=True):
    """One answer to grade against a reference by the grader of that name."""

    grader: str
    reference: str
    answer: str


class Outcome(Struct, frozen=True):
    """How a task ended. retire: the worker asks to be replaced (its memory or its interpreter may have suffered)."""

    status: Literal["correct", "wrong", "unparsable", "timeout", "error"]
    detail: str = ""
    seconds: float = 0.0
    retire: bool = False


class FrameError(Exception):
    """The peer sent what is no frame."""


def header(body: bytes) -> bytes:
    """The length prefix of a body."""
    if len(body) > MAX_FRAME_BYTES:
        raise FrameError(f"a frame of {len(body)} bytes exceeds {MAX_FRAME_BYTES}")
    return len(body).to_bytes(HEADER_BYTES, "big")


def body_length(head: bytes) -> int:
    """The length that a prefix announces."""
    length = int.from_bytes(head, "big")
    if length > MAX_FRAME_BYTES:
        raise FrameError(f"a frame of {length} bytes exceeds {MAX_FRAME_BYTES}")
    return length


def read_frame(fd: int) -> bytes | None:
    """The next body from a blocking descriptor; None at the end of the stream."""
    head = _read_exactly(fd, HEADER_BYTES)
    return _read_exactly(fd, body_length(head)) if head else None


def write_frame(fd: int, body: bytes) -> None:
    """Write a whole frame to a blocking descriptor."""
    data = memoryview(header(body) + body)
    while data:
        data = data[os.write(fd, data) :]


def _read_exactly(fd: int, count: int) -> bytes | None:
    parts: list[bytes] = []
    while count:
        part = os.read(fd, count)
        if not part:
            return None
        parts.append(part)
        count -= len(part)
    return b"".join(parts)
