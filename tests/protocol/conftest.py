"""Servers and clients that end with their test."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from protocol.client import Client
from protocol.server import Server

Serve = Callable[..., Awaitable[Server]]
Connect = Callable[..., Client]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """serve(*routes, address=…, limits=…): a started Server; a route is (kind, body type, handler[, options])."""
    servers: list[Server] = []

    async def start(*routes: tuple[Any, ...], address: str = "tcp://127.0.0.1:0", **options: Any) -> Server:
        server = Server("test", address, **options)
        for kind, body_type, handler, *more in routes:
            server.route(kind, body_type, handler, **(more[0] if more else {}))
        servers.append(server)
        await server.start()
        return server

    yield start
    for server in servers:
        await server.close()


@pytest.fixture
async def connect() -> AsyncIterator[Connect]:
    """connect(server or address, cls=Client, **options)."""
    clients: list[Client] = []

    def make(server: Server | str, cls: type[Client] = Client, **options: Any) -> Client:
        client = cls(server if isinstance(server, str) else server.address, **options)
        clients.append(client)
        return client

    yield make
    for client in clients:
        await client.close()
