"""The first look at a message that came to a server: limits, header, version. Counts what is wrong with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import zmq

from protocol.codec import RequestHeader, check_header, salvage, unpack
from protocol.counters import Counters
from protocol.errors import InvalidError, ProtocolError, VersionMismatchError
from protocol.handling import ServerLimits


class Refusal(NamedTuple):
    """A message to be answered with `error`, as reply number `seq` of request `id`."""

    id: str
    seq: int
    error: ProtocolError


def take_in(frames: Sequence[zmq.Frame], limits: ServerLimits, counters: Counters) -> RequestHeader | Refusal | None:
    """The header of a message (its frames without the identity), a refusal, or None if no answer can find its way."""
    if not frames:
        counters.malformed += 1
        return None
    if len(frames[0]) > limits.max_header_bytes:
        counters.oversized += 1
        return None
    try:
        fields = unpack(frames[0].bytes)
    except InvalidError:
        counters.malformed += 1
        return None
    request_id, seq = salvage(fields)
    try:
        if len(frames) > limits.max_frames + 1 or sum(map(len, frames)) > limits.max_message_bytes:
            counters.oversized += 1
            raise InvalidError(
                f"message too large: at most {limits.max_message_bytes} bytes in {limits.max_frames} frames"
            )
        return _checked(fields, counters)
    except ProtocolError as error:
        return Refusal(request_id, seq, error) if request_id else None


def _checked(fields: dict[str, object], counters: Counters) -> RequestHeader:
    try:
        header = check_header(fields, RequestHeader)
        if not header.id and header.kind != "ack":
            raise InvalidError("header: a request needs an id")
    except VersionMismatchError:
        counters.version_mismatch += 1
        raise
    except InvalidError:
        counters.malformed += 1
        raise
    return header
