"""A service on a ZeroMQ ROUTER: admission, deadlines, cancels, credits, fences, replays. Rooms add handlers to it.

INVARIANTS
- No message, whatever its bytes, ends the service or another client's request.
- Every request that was understood gets exactly one last reply (`done` or `error`), possibly sent several times.
- Work stops when its client cancels, its deadline passes, or a higher term takes its run over: the handler's task is
  cancelled. It keeps its place until it has really ended.
- Sending never blocks. What a peer cannot take now stays in the replay buffer until it asks again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import zmq
from prometheus_client import CollectorRegistry

from protocol import address as addresses
from protocol import counters as counting
from protocol.calls import Calls, Request, Tombstones, Waiting
from protocol.codec import (
    STATELESS_KINDS,
    AckRequest,
    Buffer,
    Payload,
    RequestHeader,
    SessionReply,
    SessionRequest,
    buffers,
    decode,
    encode,
)
from protocol.errors import (
    CancelledRequestError,
    DeadlineError,
    InternalError,
    InvalidError,
    OverloadedError,
    ProtocolError,
    StaleError,
    UnavailableError,
)
from protocol.handling import Call, Handler, Route, ServerLimits
from protocol.intake import Refusal, take_in
from protocol.messages import Body, Health
from protocol.outbox import Outbox
from protocol.pump import Pump
from protocol.sessions import Fences, Session, Sessions

__all__ = ["Call", "Handler", "Server", "ServerLimits"]

log = logging.getLogger(__name__)

B = TypeVar("B", bound=Body)

DEFAULT_LIMITS = ServerLimits()

CLOSE_LINGER_MS = 300
"""How long the last replies may take to leave after `close`."""


class Server:
    """A service. Add routes, `start`, and `close` in the end; all in one event loop.

    `health` and the wire's own `session`, `ack` and `cancel` are served without routes.
    """

    def __init__(
        self,
        name: str,
        address: str,
        *,
        limits: ServerLimits = DEFAULT_LIMITS,
        health: Callable[[], Health] | None = None,
        registry: CollectorRegistry | None = None,
        insecure: bool = False,
    ) -> None:
        self.name = name
        self.address = address
        self.limits = limits
        self.registry = registry or CollectorRegistry()
        self.counters = counting.Counters()
        self._health = health
        self._insecure = insecure
        self._routes: dict[str, Route[Any]] = {}
        self._sessions = Sessions(secrets.token_hex(8), limits.window, limits.max_sessions)
        self._fences = Fences()
        self._calls = Calls(limits.replay_bytes, limits.max_finished, limits.replay_s)
        self._waiting = Waiting()
        self._tombstones = Tombstones(limits.max_tombstones, limits.replay_s)
        self._running = 0
        self._running_control = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._idle = asyncio.Event()
        self._acknowledged = asyncio.Event()
        self._draining = False
        self._outbox: Outbox | None = None
        self._housekeeper: asyncio.TimerHandle | None = None
        self._collector = counting.register(self.registry, name, self.counters, self._gauges)

    def route(
        self, kind: str, body_type: type[B], handler: Handler[B], *, priority: int = 0, control: bool = False
    ) -> None:
        """Serve `kind`. Higher priority first; `control` requests are exempt from credits and concurrency."""
        if kind in STATELESS_KINDS or kind in self._routes:
            raise ValueError(f"{kind} is served already")
        self._routes[kind] = Route(kind, body_type, handler, priority, control)

    async def start(self) -> str:
        """Listen. Returns the real address (a port of 0 gets its number). Raises AddressError."""
        self._loop = asyncio.get_running_loop()
        socket = zmq.Context.instance().socket(zmq.ROUTER)
        try:
            for option, value in (
                (zmq.ROUTER_MANDATORY, 1),
                (zmq.ROUTER_HANDOVER, 1),
                (zmq.MAXMSGSIZE, max(self.limits.hard_frame_bytes, self.limits.max_message_bytes + 1)),
                (zmq.SNDHWM, self.limits.peer_queue),
                (zmq.RCVHWM, self.limits.peer_queue),
                (zmq.LINGER, CLOSE_LINGER_MS),
                (zmq.HEARTBEAT_IVL, 5000),
                (zmq.HEARTBEAT_TIMEOUT, 20000),
            ):
                socket.setsockopt(option, value)
            self.address = addresses.bind(socket, self.address, self._insecure)
        except BaseException:
            socket.close(0)
            raise
        pump = Pump(socket, self._on_message)
        self._outbox = Outbox(pump, self._sessions, self._calls, self.counters)
        self._housekeeper = self._loop.call_later(1.0, self._keep_house)
        return self.address

    async def close(self, drain_s: float = 0.0) -> None:
        """Refuse new work, let running work end within `drain_s`, stop the rest with `unavailable`, and let go.

        Waits `ack_grace_s` at most until the last replies are acknowledged: they would not survive the process.
        """
        self._draining = True
        if self._outbox is None:
            self._unregister()
            return
        if drain_s > 0 and (self._running or self._waiting):
            self._idle.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(drain_s):
                    await self._idle.wait()
        for request in list(self._calls.known.values()):
            if request.finished_at is None:
                self._stop(request, UnavailableError(f"{self.name} is closing"))
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=2.0)
        if self._calls.finished and self.limits.ack_grace_s > 0:
            self._acknowledged.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.limits.ack_grace_s):
                    await self._acknowledged.wait()
        if self._housekeeper:
            self._housekeeper.cancel()
        await self._outbox.close(CLOSE_LINGER_MS)
        self._unregister()

    def _unregister(self) -> None:
        with contextlib.suppress(KeyError):
            self.registry.unregister(self._collector)

    @property
    def _out(self) -> Outbox:
        if self._outbox is None:
            raise RuntimeError("the server has not been started")
        return self._outbox

    def health(self) -> Health:
        """What `health` and /readyz say now."""
        if self._draining:
            return Health(alive=True, ready=False, reason="draining")
        return self._health() if self._health else Health(alive=True, ready=True)

    def _gauges(self) -> dict[str, float]:
        return {
            "running": self._running,
            "running_control": self._running_control,
            "queued": len(self._waiting),
            "sessions": len(self._sessions),
            "replay_bytes": self._calls.bytes,
        }

    def _keep_house(self) -> None:
        now = self._loop.time()
        self._calls.expire(now)
        self._tombstones.expire(now)
        self._housekeeper = self._loop.call_later(max(0.05, min(5.0, self.limits.replay_s / 4)), self._keep_house)

    # -- messages in ---------------------------------------------------------------------------------------------

    def _on_message(self, parts: list[zmq.Frame]) -> None:
        self.counters.received += 1
        identity = parts[0].bytes
        try:
            self._dispatch(identity, parts[1:])
        except Exception:
            self.counters.failed += 1
            log.exception("%s: defect while a message was taken in", self.name)

    def _dispatch(self, identity: bytes, frames: list[zmq.Frame]) -> None:
        header = take_in(frames, self.limits, self.counters)
        if isinstance(header, Refusal):
            self._out.send_error(identity, header.id, header.seq, header.error)
        elif header is not None:
            try:
                if header.kind in STATELESS_KINDS:
                    self._serve_stateless(identity, header)
                else:
                    self._admit(identity, header, frames)
            except ProtocolError as error:
                if header.id:
                    self._out.send_error(identity, header.id, header.ack, error)

    def _body(self, header: RequestHeader, body_type: type[B], frames: Sequence[Buffer] = ()) -> B:
        try:
            return decode(header.body, body_type, frames)
        except InvalidError:
            self.counters.malformed += 1
            raise

    def _serve_stateless(self, identity: bytes, header: RequestHeader) -> None:
        if header.kind == "ack":
            for request_id, count in self._body(header, AckRequest).acks.items():
                self._calls.acknowledge(request_id, count)
            if self._draining and not self._calls.finished:
                self._acknowledged.set()
        elif header.kind == "cancel":
            self._cancel(identity, header)
        elif header.kind == "session":
            self._resynchronise(identity, header)
        else:
            self._out.send_body(identity, header.id, header.ack, "done", encode(self.health()))

    def _cancel(self, identity: bytes, header: RequestHeader) -> None:
        request = self._calls.known.get(header.id)
        if request is None:
            self.counters.early_cancels += 1
        elif request.finished_at is None:
            self.counters.cancelled += 1
            self._stop(request, CancelledRequestError("cancelled by its client"))
        if request is not None:
            self._calls.forget(request)
        self._tombstones.add(header.id, self._loop.time())

    def _resynchronise(self, identity: bytes, header: RequestHeader) -> None:
        """Answer `session`: which of the client's open requests are unknown; the replies it lacks of the others."""
        unknown: list[str] = []
        for request_id, count in self._body(header, SessionRequest).open.items():
            request = self._calls.known.get(request_id)
            if request is None:
                unknown.append(request_id)
            else:
                request.identity = identity
                self._replay(request, count)
        session = self._sessions.of(identity)
        accepted = session.received if session else 0
        self._out.send_body(identity, header.id, header.ack, "done", encode(SessionReply(accepted, unknown)))

    # -- admission -----------------------------------------------------------------------------------------------

    def _admit(self, identity: bytes, header: RequestHeader, frames: list[zmq.Frame]) -> None:
        counters, now = self.counters, self._loop.time()
        known = self._calls.known.get(header.id)
        if known is None:
            session = self._sessions.of(identity)
            if session is None:
                counters.overloaded += 1
                raise OverloadedError("too many clients", retry_after_ms=self.limits.retry_after_ms * 10)
            session.received += 1
            try:
                self._admit_new(session, header, frames, now)
            except ProtocolError:
                session.finished += 1
                raise
            return
        counters.duplicates += 1
        self._check_fence(header)
        if known.route.kind != header.kind:
            raise InvalidError(f"request id {header.id} belongs to a request of kind {known.route.kind}")
        known.identity = identity
        if known.finished_at is None and now + header.timeout_ms / 1000 > known.deadline + 0.1:
            self._set_deadline(known, now + header.timeout_ms / 1000)
        self._replay(known, header.ack)

    def _admit_new(self, session: Session, header: RequestHeader, frames: list[zmq.Frame], now: float) -> None:
        route = self._routes.get(header.kind)
        if route is None:
            self.counters.malformed += 1
            raise InvalidError(f"{self.name} does not serve {header.kind!r}")
        if self._tombstones.covers(header.id, now):
            self.counters.cancelled += 1
            raise CancelledRequestError("cancelled before it came")
        self._check_fence(header)
        if header.timeout_ms <= 0:
            self.counters.deadlines += 1
            raise DeadlineError("timeout_ms is not positive")
        if self._draining:
            raise UnavailableError(f"{self.name} is draining")
        self._check_room(session, route)
        request = Request(header.id, route, session, now)
        request.body = self._body(header, route.body_type, buffers(frames[1:]))
        request.run, request.trace = header.run, header.trace
        request.term, request.incarnation = header.term, header.incarnation
        self.counters.accepted += 1
        self._calls.add(request)
        self._set_deadline(request, now + header.timeout_ms / 1000)
        if route.control:
            self._running_control += 1
            self._launch(request)
            return
        session.running += 1
        if self._running < self.limits.max_concurrent:
            self._running += 1
            self._launch(request)
        else:
            self._waiting.push(request)

    def _check_room(self, session: Session, route: Route[Any]) -> None:
        limits = self.limits
        if route.control:
            full = "too many control requests" if self._running_control >= limits.max_control else ""
        elif session.running >= session.window:
            full = "no credit"
        else:
            busy = self._running >= limits.max_concurrent and len(self._waiting) >= limits.max_queued
            full = "the queue is full" if busy else ""
        if full:
            self.counters.overloaded += 1
            raise OverloadedError(full, retry_after_ms=limits.retry_after_ms)

    def _check_fence(self, header: RequestHeader) -> None:
        reason, higher = self._fences.check(header.run, header.term, header.incarnation)
        if reason:
            self.counters.stale += 1
            raise StaleError(reason)
        if higher:
            for old in list(self._calls.known.values()):
                if old.finished_at is None and old.run == header.run and 0 < old.term < header.term:
                    self._stop(old, StaleError(f"term {header.term} took over run {header.run!r}"))

    # -- work ----------------------------------------------------------------------------------------------------

    def _set_deadline(self, request: Request, deadline: float) -> None:
        if request.timer:
            request.timer.cancel()
        request.deadline = deadline
        request.timer = self._loop.call_at(deadline, self._expire, request)

    def _expire(self, request: Request) -> None:
        self.counters.deadlines += 1
        self._stop(request, DeadlineError("its time ran out at the server"))

    def _launch(self, request: Request) -> None:
        task = request.task = self._loop.create_task(self._work(request))
        self._tasks.add(task)
        task.add_done_callback(lambda done: self._ended(request, done))

    async def _work(self, request: Request) -> None:
        try:
            body = await request.route.handler(Call(self._out, request), request.body)
            result: Payload | ProtocolError = encode(body)
        except ProtocolError as error:
            result = error
        except asyncio.CancelledError:
            if request.finished_at is not None:
                return
            result = InternalError("the handler was cancelled")
        except Exception as error:
            self.counters.failed += 1
            log.exception("%s: defect in the handler of %s", self.name, request.route.kind)
            result = InternalError(f"{type(error).__name__}: {error}")
        self._finish(request, result)

    def _ended(self, request: Request, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        request.task = None
        if not task.cancelled() and task.exception() is not None:
            log.error("%s: defect after a handler of %s", self.name, request.route.kind, exc_info=task.exception())
        if request.finished_at is None:
            self._finish(request, InternalError("the handler was cancelled"))
        if request.route.control:
            self._running_control -= 1
            return
        self._running -= 1
        following = self._waiting.pop()
        if following is not None:
            self._running += 1
            self._launch(following)
        elif not self._running:
            self._idle.set()

    def _stop(self, request: Request, error: ProtocolError) -> None:
        """End a request now: its last reply goes out, then its handler's task is cancelled."""
        self._waiting.remove(request)
        self._finish(request, error)
        if request.task is not None:
            request.task.cancel()

    def _replay(self, request: Request, count: int) -> None:
        if self._out.replay(request, count):
            return
        error = UnavailableError("replies of this request were given up for lack of memory")
        if request.finished_at is None:
            self._stop(request, error)
        self._out.send_error(request.identity, request.id, count, error)
        self._calls.forget(request)

    def _finish(self, request: Request, result: Payload | ProtocolError) -> None:
        if request.finished_at is not None:
            return
        request.finished_at = self._loop.time()
        if request.timer:
            request.timer.cancel()
            request.timer = None
        request.session.finished += 1
        if not request.route.control:
            request.session.running -= 1
        self._out.reply(request, "error" if isinstance(result, ProtocolError) else "done", result)
        if isinstance(result, OverloadedError):
            self._calls.forget(request)  # asking again is a new attempt
        else:
            self._calls.finish(request, request.finished_at)
