"""One DEALER to one server: requests with deadlines, streamed replies, credits, reconnects, resends. Typed errors only.

INVARIANTS
- Every await ends by the request's deadline; then DeadlineError is raised here and a cancel is on its way.
- Replies of a request are delivered in order and once. What came out of order, twice, or beyond the room for it is
  dropped, not acknowledged, and asked for again.
- A server that restarted is recognised by its session key; requests it does not know start over (a stream may then
  repeat items: its reader removes duplicates by the items' own indices).
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections import OrderedDict
from collections.abc import AsyncGenerator, Sequence
from typing import Self, TypeVar

import zmq

from protocol.codec import (
    CREDIT_FREE_KINDS,
    EMPTY,
    STATELESS_KINDS,
    AckRequest,
    Buffer,
    ErrorBody,
    ReplyHeader,
    SessionReply,
    SessionRequest,
    buffers,
    check_header,
    decode,
    encode,
    error_in,
    request_header,
    salvage,
    unpack,
)
from protocol.dealer import Dealer
from protocol.errors import (
    DeadlineError,
    ErrorCode,
    InvalidError,
    OverloadedError,
    ProtocolError,
    UnavailableError,
)
from protocol.messages import Body
from protocol.pending import Pending
from protocol.window import Change, Window

R = TypeVar("R", bound=Body)
I = TypeVar("I", bound=Body)  # noqa: E741
D = TypeVar("D", bound=Body)

QUEUE_REPLIES = 1024
"""Replies of one request that wait for their reader; more are asked for again when it has caught up."""

MAX_PENDING = 65536
"""Open requests of one client."""

CLOSE_LINGER_MS = 200
"""How long the last cancels and acknowledgements may take to leave, in the background, after `close`."""

RETRY_AFTER_MS = 100
"""When to try again after an `overloaded` that does not say."""

MAX_ID = 256

ACK_DELAY_S = 0.05
"""Acknowledgements are gathered so long."""

REPLY_KINDS = frozenset(("reply", "done", "error"))

PROBE_IDS = 4096
"""Open ids in one `session` message."""

PROBE_PATIENCE = 5
"""While a probe is not answered, the next one waits for so many times `resend_s`."""


class Client:
    """Connection to the server at `address`; made and used within one event loop, opened by the first request.

    run, term, incarnation: stated in every request, checked by the server's fences; 0 and '' state nothing.
    resend_s: without progress for so long, the server is asked what it still knows.
    """

    def __init__(
        self,
        address: str,
        *,
        name: str = "client",
        run: str = "",
        term: int = 0,
        incarnation: int = 0,
        resend_s: float = 2.0,
    ) -> None:
        self.address = address
        self.name = name
        self.origin: dict[str, object] = {}
        if run:
            self.origin["run"] = run
        if term:
            self.origin["term"] = term
        if incarnation:
            self.origin["incarnation"] = incarnation
        self._resend_s = resend_s
        self._identity = f"{name[:64]}-{secrets.token_hex(8)}"
        self._numbers = itertools.count(1)
        self._pending: dict[str, Pending] = {}
        self._control: OrderedDict[str, Pending] = OrderedDict()  # waiting for the connection
        self._queue: OrderedDict[str, Pending] = OrderedDict()  # waiting for credit or for the connection
        self._acks: dict[str, int] = {}
        self._ack_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None
        self._window = Window()
        self._dealer: Dealer | None = None
        self._closed = False
        self.duplicates = 0  # replies dropped because they were known
        self.malformed = 0  # replies dropped because they could not be understood

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def request(
        self,
        kind: str,
        body: Body,
        reply_type: type[R],
        *,
        timeout_s: float,
        request_id: str | None = None,
        trace: str = "",
    ) -> R:
        """Send one request and return its last reply; earlier replies are passed over.

        request_id names one attempt: repeat it only to attach to the same work. Raises ProtocolError, in time.
        """
        pending = self._open(kind, body, timeout_s, request_id, trace)
        try:
            while True:
                header, frames = await self._next(pending)
                if pending.final and not pending.items:
                    if header.kind == "error":
                        raise error_in(header)
                    return decode(header.body, reply_type, frames)
        finally:
            self._release(pending)

    async def stream(
        self,
        kind: str,
        body: Body,
        item_type: type[I],
        done_type: type[D],
        *,
        timeout_s: float,
        request_id: str | None = None,
        trace: str = "",
    ) -> AsyncGenerator[I | D, None]:
        """Send one request and yield its replies; the one yielded last is the `done` body.

        Closing the generator early cancels the request at the server. Raises ProtocolError, in time.
        """
        pending = self._open(kind, body, timeout_s, request_id, trace)
        try:
            while True:
                header, frames = await self._next(pending)
                if header.kind == "reply":
                    yield decode(header.body, item_type, frames)
                elif header.kind == "error":
                    raise error_in(header)
                else:
                    yield decode(header.body, done_type, frames)
                    return
        finally:
            self._release(pending)

    async def close(self) -> None:
        """Cancel what is running and let the connection go. Never waits."""
        if self._closed:
            return
        self._closed = True
        for pending in list(self._pending.values()):
            if pending.sent and not pending.final:
                self._send_cancel(pending)
            pending.fail(UnavailableError(f"the client of {self.address} was closed"))
        self._flush_acks()
        for timer in (self._ack_timer, self._stall_timer):
            if timer:
                timer.cancel()
        if self._dealer is not None:
            self._dealer.close(CLOSE_LINGER_MS)

    # -- one request ---------------------------------------------------------------------------------------------

    def _open(self, kind: str, body: Body, timeout_s: float, request_id: str | None, trace: str) -> Pending:
        if self._closed:
            raise UnavailableError(f"the client of {self.address} is closed")
        if timeout_s <= 0:
            raise DeadlineError(f"{kind} to {self.address}: no time left")
        if self._dealer is None:
            self._loop = asyncio.get_running_loop()
            self._dealer = Dealer(self.address, self._identity, self._on_message, self._flush_queue, self._on_connected)
        request_id = request_id or f"{self._identity}.{next(self._numbers)}"
        if len(self._pending) >= MAX_PENDING:
            raise OverloadedError(f"{MAX_PENDING} requests to {self.address} are open already")
        if request_id in self._pending:
            raise InvalidError(f"request {request_id} is already running on this client")
        if len(request_id) > MAX_ID or len(trace) > MAX_ID:
            raise InvalidError(f"request ids and traces have at most {MAX_ID} characters")
        now = self._loop.time()
        pending = Pending(request_id, kind, encode(body), now + timeout_s)
        pending.origin = self.origin | {"trace": trace} if trace else self.origin
        pending.timer = self._loop.call_at(pending.deadline, self._expire, pending)
        self._pending[request_id] = pending
        self._enqueue(pending)
        if self._stall_timer is None:
            self._stall_timer = self._loop.call_later(self._resend_s / 2, self._look_for_stalls)
        return pending

    async def _next(self, pending: Pending) -> tuple[ReplyHeader, Sequence[Buffer]]:
        reply = await pending.next()
        if pending.overflowed and len(pending.items) <= QUEUE_REPLIES // 2:
            pending.overflowed = False
            self._send_probe([pending])
        return reply

    def _release(self, pending: Pending) -> None:
        """Forget a request; if its last reply has not come, take it back at the server."""
        if self._pending.get(pending.id) is pending:
            del self._pending[pending.id]
            self._control.pop(pending.id, None)
            self._queue.pop(pending.id, None)
            for timer in (pending.timer, pending.retry):
                if timer:
                    timer.cancel()
            if pending.sent and not pending.final and not self._closed and pending.kind not in STATELESS_KINDS:
                self._send_cancel(pending)
            if self._window.simple and self._queue:
                self._flush_queue()

    def _expire(self, pending: Pending) -> None:
        self._control.pop(pending.id, None)
        self._queue.pop(pending.id, None)
        pending.fail(DeadlineError(f"{pending.kind} to {self.address}: no answer in time"))

    # -- out -----------------------------------------------------------------------------------------------------

    def _enqueue(self, pending: Pending) -> None:
        pending.sent = False
        (self._control if pending.kind in CREDIT_FREE_KINDS else self._queue)[pending.id] = pending
        self._flush_queue()

    def _flush_queue(self) -> None:
        """Send what waits, in order, as far as credit and the connection allow."""
        for queue in (self._control, self._queue):
            while queue:
                in_flight = len(self._pending) - len(self._queue) - len(self._control)
                if queue is self._queue and not self._window.allows(in_flight):
                    return
                if not self._send_request(next(iter(queue.values()))):
                    return
                queue.popitem(last=False)

    def _send_request(self, pending: Pending) -> bool:
        now = self._loop.time()
        remaining_ms = max(1, int((pending.deadline - now) * 1000))
        head = request_header(
            pending.kind,
            pending.id,
            pending.payload.packed,
            timeout_ms=remaining_ms,
            ack=pending.expected,
            origin=pending.origin,
        )
        if self._dealer is None or not self._dealer.send([head, *pending.payload.frames]):
            return False
        pending.order = self._window.note_request(pending.kind not in STATELESS_KINDS)
        pending.sent = True
        pending.progress_at = now
        return True

    def _send_control(self, kind: str, request_id: str, body: Body | None) -> bool:
        payload = EMPTY if body is None else encode(body)
        return self._dealer is not None and self._dealer.send([request_header(kind, request_id, payload.packed)])

    def _send_cancel(self, pending: Pending) -> None:
        self._acks.pop(pending.id, None)
        self._send_control("cancel", pending.id, None)

    def _acknowledge(self, pending: Pending) -> None:
        if not self._window.simple and pending.kind not in STATELESS_KINDS:
            self._acks[pending.id] = pending.expected
            if self._ack_timer is None:
                self._ack_timer = self._loop.call_later(ACK_DELAY_S, self._flush_acks)

    def _flush_acks(self) -> None:
        if self._ack_timer is not None:
            self._ack_timer.cancel()
            self._ack_timer = None
        if self._acks:
            acks, self._acks = self._acks, {}
            self._send_control("ack", "", AckRequest(acks))

    def _look_for_stalls(self) -> None:
        """Ask about requests that have had no reply for `resend_s`, and for credit if some wait for it."""
        self._stall_timer = None
        if not self._pending or self._closed:
            return
        now = self._loop.time()
        since = now - self._resend_s
        stalled = [p for p in self._pending.values() if p.sent and not p.final and p.progress_at <= since]
        patience = now - PROBE_PATIENCE * self._resend_s
        if (stalled or self._queue) and not self._window.simple and not self._window.asked_since(patience):
            self._send_probe(stalled)
        self._stall_timer = self._loop.call_later(self._resend_s / 2, self._look_for_stalls)

    def _send_probe(self, pendings: list[Pending]) -> None:
        """`session`: credit, the replies we lack of these requests, and which of them the server does not know."""
        self._flush_acks()
        now = self._loop.time()
        for start in range(0, max(1, len(pendings)), PROBE_IDS):
            some = pendings[start : start + PROBE_IDS]
            probe_id = f"{self._identity}.s{next(self._numbers)}"
            if not self._send_control("session", probe_id, SessionRequest({p.id: p.expected for p in some})):
                return
            self._window.note_probe(probe_id, now)
            for pending in some:
                pending.progress_at = now

    def _open_requests(self) -> list[Pending]:
        return [p for p in self._pending.values() if p.sent and not p.final]

    def _on_connected(self, again: bool) -> None:
        """A connection stands. If not for the first time, whatever was on its way may be lost."""
        if again:
            self._window.forget_probes()
            if not self._window.session:
                for pending in self._open_requests():
                    self._enqueue(pending)
            if not self._window.simple:
                self._send_probe(self._open_requests())
        self._flush_queue()

    # -- in ------------------------------------------------------------------------------------------------------

    def _on_message(self, parts: list[zmq.Frame]) -> None:
        try:
            fields = unpack(parts[0].bytes)
        except InvalidError:
            self.malformed += 1
            return
        try:
            header = check_header(fields, ReplyHeader)
        except ProtocolError as error:
            self.malformed += 1
            pending = self._pending.get(salvage(fields).id or "")
            if pending is not None:
                pending.fail(error)
            return
        try:
            change = self._window.hear(header)
            if change is Change.RESTARTED:
                self._send_probe(self._open_requests())
            if self._window.is_probe(header.id):
                self._on_session(header)
            else:
                self._on_reply(header, parts)
            if change is not Change.NOTHING:
                self._flush_queue()
        except ProtocolError:
            self.malformed += 1

    def _on_session(self, header: ReplyHeader) -> None:
        """The answer of a probe: send again what the server does not know."""
        knew_sessions = bool(self._window.session)
        if header.kind == "done":
            reply = decode(header.body, SessionReply)
            probe = self._window.answered(header, reply.accepted)
            unknown = [p for p in map(self._pending.get, reply.unknown) if p is not None]
        else:
            probe = self._window.answered(header, None)
            replaced = knew_sessions and not self._window.session  # by a simple server
            unknown = self._open_requests() if replaced else []
        for pending in unknown:
            if pending.sent and not pending.final and pending.order < probe.order:
                pending.expected = 0
                self._enqueue(pending)
        self._flush_queue()

    def _on_reply(self, header: ReplyHeader, parts: list[zmq.Frame]) -> None:
        pending = self._pending.get(header.id)
        if pending is None:
            return
        if header.kind not in REPLY_KINDS:
            self.malformed += 1
            return
        last = header.kind != "reply"
        seq = pending.expected if header.seq is None or (last and not header.session) else header.seq
        if seq < pending.expected or pending.final:
            self.duplicates += 1
            self._acknowledge(pending)
            return
        if seq > pending.expected and header.session:
            if not pending.overflowed and pending.gap_at != pending.expected:
                pending.gap_at = pending.expected
                self._send_probe([pending])
            return
        if (
            header.error is not None
            and header.error.code == ErrorCode.OVERLOADED
            and self._retry(pending, header.error)
        ):
            return
        if len(pending.items) >= QUEUE_REPLIES:
            pending.overflowed = True
            if not header.session:
                pending.fail(UnavailableError(f"replies of {self.address} came faster than they were read"))
            return
        pending.expected = seq + 1
        pending.progress_at = self._loop.time()
        pending.items.append((header, buffers(parts[1:])))
        if last:
            pending.final = True
            if pending.timer:
                pending.timer.cancel()
        self._acknowledge(pending)
        pending.wake()

    def _retry(self, pending: Pending, error: ErrorBody) -> bool:
        """After `overloaded`: send the request again when told to, if its deadline allows that."""
        if not pending.sent:
            return True
        after_s = (error.retry_after_ms or RETRY_AFTER_MS) / 1000
        if pending.expected or self._loop.time() + after_s >= pending.deadline:
            return False
        pending.sent = False
        pending.retry = self._loop.call_later(after_s, self._enqueue, pending)
        if not self._window.asked_since(0.0) and not self._window.simple:
            self._send_probe([])
        return True
