"""The HTTP side of a service: three GET paths, nothing else."""

from __future__ import annotations

from collections.abc import Callable

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from protocol.errors import AddressError
from protocol.messages import Health

MAX_BODY_BYTES = 1024


class HttpStatus:
    """/healthz (200: the loop is alive), /readyz (200: would take work now, else 503 and why), /metrics (Prometheus).

    Other paths are 404, other methods 405. bind: `host:port`; port 0 gets a free one.
    """

    def __init__(self, bind: str, health: Callable[[], Health], registry: CollectorRegistry) -> None:
        host, separator, port = bind.rpartition(":")
        if not separator or not host or not port.isdigit() or int(port) > 65535:
            raise AddressError(f"bad address: {bind} (expected host:port)")
        self.bind = bind
        self._host = host.strip("[]")
        self._port = int(port)
        self._health = health
        self._registry = registry
        self._runner: web.AppRunner | None = None

    async def start(self) -> str:
        """Listen; returns the real `host:port`. Raises AddressError."""
        app = web.Application(client_max_size=MAX_BODY_BYTES)
        app.router.add_get("/healthz", self._healthz, allow_head=False)
        app.router.add_get("/readyz", self._readyz, allow_head=False)
        app.router.add_get("/metrics", self._metrics, allow_head=False)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0, keepalive_timeout=15.0)
        await runner.setup()
        try:
            await web.TCPSite(runner, self._host, self._port).start()
        except OSError as error:
            await runner.cleanup()
            raise AddressError(f"cannot listen: {self.bind} ({error.strerror or error})") from None
        self._runner = runner
        if self._port == 0:
            self._port = runner.addresses[0][1]
        return f"{self._host}:{self._port}"

    async def close(self) -> None:
        runner, self._runner = self._runner, None
        if runner is not None:
            await runner.cleanup()

    async def _healthz(self, _: web.Request) -> web.Response:
        alive = self._health().alive
        return web.Response(text="alive\n" if alive else "not alive\n", status=200 if alive else 503)

    async def _readyz(self, _: web.Request) -> web.Response:
        health = self._health()
        if health.alive and health.ready:
            return web.Response(text="ready\n")
        return web.Response(text=f"not ready: {health.reason}\n", status=503)

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=generate_latest(self._registry), headers={"Content-Type": CONTENT_TYPE_LATEST})
