"""Typed errors of the wire. Every failed request ends in exactly one of them, at the server and at the client alike."""

from __future__ import annotations

from enum import StrEnum


class ErrorCode(StrEnum):
    """What went wrong, as it travels in an `error` reply."""

    INVALID = "invalid"  # the message is malformed or asks for something impossible; resending it is useless
    OVERLOADED = "overloaded"  # no credit or a full queue; try again after `retry_after_ms`
    DEADLINE = "deadline"  # the request's time ran out; its work was stopped
    UNAVAILABLE = "unavailable"  # the service cannot do this now (starting, paused, draining, engine down)
    VERSION_MISMATCH = "version_mismatch"  # unknown major version of the protocol, or weights of another version
    STALE = "stale"  # older than a bound, a term or an incarnation allows
    REFUSED = "refused"  # understood, and against the rules (duplicate step, off the lineage, not registered)
    CANCELLED = "cancelled"  # the client took the request back
    INTERNAL = "internal"  # a defect or a crash at the server


class ProtocolError(Exception):
    """Root of all errors that clients of this package raise.

    code: what went wrong; retry_after_ms: when to try again (`overloaded` only); detail: text for people.
    """

    code: ErrorCode = ErrorCode.INTERNAL

    def __init__(self, detail: str = "", *, retry_after_ms: int | None = None) -> None:
        super().__init__(f"{self.code.value}: {detail}" if detail else self.code.value)
        self.detail = detail
        self.retry_after_ms = retry_after_ms


class InvalidError(ProtocolError):
    code = ErrorCode.INVALID


class OverloadedError(ProtocolError):
    code = ErrorCode.OVERLOADED


class DeadlineError(ProtocolError):
    code = ErrorCode.DEADLINE


class UnavailableError(ProtocolError):
    code = ErrorCode.UNAVAILABLE


class VersionMismatchError(ProtocolError):
    code = ErrorCode.VERSION_MISMATCH


class StaleError(ProtocolError):
    code = ErrorCode.STALE


class RefusedError(ProtocolError):
    code = ErrorCode.REFUSED


class CancelledRequestError(ProtocolError):
    code = ErrorCode.CANCELLED


class InternalError(ProtocolError):
    code = ErrorCode.INTERNAL


_BY_CODE: dict[ErrorCode, type[ProtocolError]] = {
    cls.code: cls
    for cls in (
        InvalidError,
        OverloadedError,
        DeadlineError,
        UnavailableError,
        VersionMismatchError,
        StaleError,
        RefusedError,
        CancelledRequestError,
        InternalError,
    )
}


def error_of(code: str, detail: str = "", retry_after_ms: int | None = None) -> ProtocolError:
    """The exception for an `error` reply; a code that this version does not know becomes InternalError."""
    try:
        cls = _BY_CODE[ErrorCode(code)]
    except ValueError:
        return InternalError(f"unknown error code {code!r}: {detail}", retry_after_ms=retry_after_ms)
    return cls(detail, retry_after_ms=retry_after_ms)


class AddressError(Exception):
    """A service cannot listen at the address it was given. The text is one line and names the address."""
