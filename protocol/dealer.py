"""A client's socket: one DEALER that reconnects by itself and tells when it has."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import zmq

from protocol.codec import Buffer
from protocol.errors import InvalidError, UnavailableError
from protocol.pump import Pump

HARD_FRAME_BYTES = 256 << 20
"""A server that sends a larger frame loses the connection."""


class Dealer:
    """on_message(frames); on_writable() after a `send` that found no room; on_connected(again) per handshake."""

    def __init__(
        self,
        address: str,
        identity: str,
        on_message: Callable[[list[zmq.Frame]], None],
        on_writable: Callable[[], None],
        on_connected: Callable[[bool], None],
    ) -> None:
        self._address = address
        self._on_connected = on_connected
        self._connected_before = False
        self._socket = zmq.Context.instance().socket(zmq.DEALER)
        for option, value in (
            (zmq.LINGER, 0),
            (zmq.IMMEDIATE, 1),  # nothing is queued for a server that is not there
            (zmq.RECONNECT_IVL, 50),
            (zmq.RECONNECT_IVL_MAX, 1000),
            (zmq.MAXMSGSIZE, HARD_FRAME_BYTES),
            (zmq.HEARTBEAT_IVL, 5000),
            (zmq.HEARTBEAT_TIMEOUT, 20000),
            (zmq.IPV6, int("[" in address)),
        ):
            self._socket.setsockopt(option, value)
        self._socket.setsockopt(zmq.ROUTING_ID, identity.encode())
        monitor = self._socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
        self._monitor = Pump(monitor, self._on_event)
        self._pump = Pump(self._socket, on_message, on_writable)
        try:
            self._socket.connect(address)
        except zmq.ZMQError as error:
            self.close(0)
            raise InvalidError(f"cannot connect to {address}: {zmq.strerror(error.errno or 0)}") from None

    def send(self, parts: Sequence[Buffer]) -> bool:
        """False if no connection takes it now; then on_writable is called as soon as one does."""
        if self._pump.closed:
            return False
        try:
            self._pump.send(parts)
        except zmq.Again:
            self._pump.want_write = True
            self._pump.kick()
            return False
        except zmq.ZMQError as error:
            raise UnavailableError(f"cannot send to {self._address}: {error}") from None
        return True

    def close(self, linger_ms: int) -> None:
        if not self._pump.closed:
            self._monitor.close(0)
            self._socket.disable_monitor()
            self._pump.close(linger_ms)

    def _on_event(self, _: list[zmq.Frame]) -> None:
        again, self._connected_before = self._connected_before, True
        if not self._pump.closed:
            self._on_connected(again)
