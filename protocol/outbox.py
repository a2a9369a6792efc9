"""Replies on their way out of a server: numbered, held until acknowledged, sent without ever waiting for a peer.

INVARIANT: the replies of a request leave in order. While one is blocked by a full peer, later ones wait behind it.
"""

from __future__ import annotations

import asyncio

import zmq

from protocol.calls import Calls, Reply, Request
from protocol.codec import Buffer, Payload, error_header, reply_header
from protocol.counters import Counters
from protocol.errors import ProtocolError
from protocol.pump import Pump
from protocol.sessions import Sessions

CLOSE_TIMEOUT_S = 2.0
"""How long ZeroMQ may take to free an address."""

UNBLOCK_S = 0.01
"""Pause before a full peer is offered its replies again."""


class Outbox:
    """The sending side of one server. `replies` of a request live in `calls`."""

    def __init__(self, pump: Pump, sessions: Sessions, calls: Calls, counters: Counters) -> None:
        self._pump = pump
        self._sessions = sessions
        self._calls = calls
        self._counters = counters
        self._loop = asyncio.get_running_loop()
        self._blocked: dict[str, Request] = {}
        self._unblocker: asyncio.TimerHandle | None = None

    async def close(self, linger_ms: int) -> None:
        """Free the address, then close the socket; what was sent may take `linger_ms` more, in the background."""
        if self._unblocker:
            self._unblocker.cancel()
        await self._pump.stop_listening(CLOSE_TIMEOUT_S)
        self._pump.close(linger_ms)

    def reply(self, request: Request, kind: str, payload: Payload | ProtocolError) -> bool:
        """Number, hold and send a reply. False if it could not be sent now."""
        reply = self._calls.append(request, kind, payload)
        if self._blocked.get(request.id) is request:
            return False
        sent = self._send_reply(request, reply)
        if sent is None:
            self._block(request, reply.seq)
        return bool(sent)

    def _block(self, request: Request, seq: int) -> None:
        request.blocked_at = seq
        self._blocked[request.id] = request
        if self._unblocker is None:
            self._unblocker = self._loop.call_later(UNBLOCK_S, self._unblock)

    def _unblock(self) -> None:
        """Offer the replies that were blocked again, in order."""
        self._unblocker = None
        blocked, self._blocked = self._blocked, {}
        for request in blocked.values():
            for reply in request.replies:
                if reply.seq >= request.blocked_at and self._send_reply(request, reply) is None:
                    self._block(request, reply.seq)
                    break

    def replay(self, request: Request, count: int) -> bool:
        """The client has `count` replies of this request: send it the others again. False if some are not held."""
        self._calls.acknowledge(request.id, count)
        if count < request.first_held:
            return False
        self._blocked.pop(request.id, None)
        for reply in request.replies:
            self._counters.replayed += 1
            sent = self._send_reply(request, reply)
            if sent is None:
                self._block(request, reply.seq)
            if not sent:
                break
        return True

    def _send_reply(self, request: Request, reply: Reply) -> bool | None:
        if isinstance(reply.payload, ProtocolError):
            return self.send_error(request.identity, request.id, reply.seq, reply.payload)
        return self.send_body(request.identity, request.id, reply.seq, reply.kind, reply.payload)

    def send_body(self, identity: bytes, request_id: str, seq: int, kind: str, payload: Payload) -> bool | None:
        session = self._sessions.of(identity)
        key, credit = (session.key, session.credit) if session else ("", 0)
        head = reply_header(kind, request_id, seq, payload.packed, session=key, credit=credit)
        return self._send([identity, head, *payload.frames])

    def send_error(self, identity: bytes, request_id: str, seq: int, error: ProtocolError) -> bool | None:
        session = self._sessions.of(identity)
        key, credit = (session.key, session.credit) if session else ("", 0)
        return self._send([identity, error_header(request_id, seq, error, session=key, credit=credit)])

    def _send(self, parts: list[Buffer]) -> bool | None:
        """True: sent. False: the peer is gone. None: its queue is full."""
        if self._pump.closed:
            return False
        try:
            self._pump.send(parts)
        except zmq.Again:
            self._counters.blocked += 1
            return None
        except zmq.ZMQError:
            self._counters.unreachable += 1
        else:
            self._counters.replies += 1
            return True
        return False
