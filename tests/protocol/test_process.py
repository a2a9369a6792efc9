"""Addresses, signals, the ready line, death with the parent, HTTP."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from pathlib import Path

import aiohttp
import pytest
from prometheus_client import CollectorRegistry

from protocol.errors import AddressError, UnavailableError
from protocol.http import HttpStatus
from protocol.messages import Ack, Body, Health, InfoRequest
from protocol.server import Call, Server
from tests.protocol.conftest import Connect, Serve

T = 10.0
ROOT = Path(__file__).parents[2]

SERVICE = """
import asyncio, sys
from protocol.messages import Ack, InfoRequest
from protocol.process import announce, die_with_parent, serve_until_signal
from protocol.server import Server

async def slow(call, body):
    await call.reply(Ack())
    await asyncio.sleep(body.wait_ms / 1000)
    return Ack()

async def main():
    die_with_parent()
    server = Server("s", sys.argv[1])
    server.route("x", InfoRequest, slow)
    announce("s", await server.start())
    number = await serve_until_signal(server, drain_s=5.0)
    print(number.name, flush=True)

asyncio.run(main())
"""

PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1], sys.argv[2]], stdout=subprocess.PIPE, text=True)
print(child.stdout.readline().strip(), child.pid, flush=True)
child.wait()
"""


async def spawn(*arguments: str) -> asyncio.subprocess.Process:
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return await asyncio.create_subprocess_exec(
        sys.executable, "-c", *arguments, stdout=asyncio.subprocess.PIPE, cwd=ROOT, env=env
    )


async def line(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    return (await asyncio.wait_for(process.stdout.readline(), 30.0)).decode().strip()


async def test_a_service_says_ready_drains_on_sigterm_and_is_restarted(connect: Connect, tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/s"
    process = await spawn(SERVICE, address)
    assert await line(process) == f"ready s {address}"
    client = connect(address, resend_s=0.2)
    stream = client.stream("x", InfoRequest(wait_ms=300), Ack, Ack, timeout_s=T)
    assert await anext(stream) == Ack()
    process.send_signal(signal.SIGTERM)
    assert [reply async for reply in stream] == [Ack()]
    assert await line(process) == "SIGTERM"
    assert await asyncio.wait_for(process.wait(), T) == 0

    working = asyncio.create_task(client.request("x", InfoRequest(wait_ms=100), Ack, timeout_s=30.0))
    first = await spawn(SERVICE, address)
    assert await line(first) == f"ready s {address}"
    first.kill()  # most likely in the midst of it; it leaves its socket file behind
    await first.wait()
    second = await spawn(SERVICE, address)
    assert await line(second) == f"ready s {address}"
    assert await working == Ack()
    second.terminate()
    await asyncio.wait_for(second.wait(), T)


async def test_a_service_dies_with_its_parent(tmp_path: Path) -> None:
    parent = await spawn(PARENT, SERVICE, f"ipc://{tmp_path}/s")
    *_, pid = (await line(parent)).split()
    watched = os.pidfd_open(int(pid))
    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(watched, ended.set)
    parent.kill()
    await asyncio.wait_for(ended.wait(), T)
    asyncio.get_running_loop().remove_reader(watched)
    os.close(watched)
    await parent.wait()


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("tcp://0.0.0.0:0", "insecure"),
        ("tcp://*:0", "insecure"),
        ("tcp://10.1.2.3:5555", "insecure"),
        ("tcp://localhost", "bad address"),
        ("tcp://127.0.0.1:99999", "bad address"),
        ("udp://127.0.0.1:1", "bad address"),
        ("ipc:///no/such/folder/s", "folder"),
        ("ipc:///" + "x" * 200, "107"),
        ("auto", "bad address"),
    ],
)
async def test_addresses_that_are_refused(address: str, says: str) -> None:
    with pytest.raises(AddressError, match=says) as raised:
        await Server("s", address).start()
    assert address in str(raised.value) and "\n" not in str(raised.value)


async def test_insecure_has_to_be_said_aloud(serve: Serve) -> None:
    assert (await serve(address="tcp://0.0.0.0:0", insecure=True)).address.startswith("tcp://0.0.0.0:")


async def test_an_address_in_use_is_one_line(serve: Serve, tmp_path: Path) -> None:
    for address in ((await serve()).address, (await serve(address=f"ipc://{tmp_path}/s")).address):
        with pytest.raises(AddressError, match="address in use") as raised:
            await Server("other", address).start()
        assert address in str(raised.value) and "\n" not in str(raised.value)


async def test_a_stale_socket_file_is_removed_and_other_files_are_not(serve: Serve, tmp_path: Path) -> None:
    stale, other = tmp_path / "stale", tmp_path / "other"
    with socket.socket(socket.AF_UNIX) as abandoned:
        abandoned.bind(str(stale))
    await serve(address=f"ipc://{stale}")
    other.write_text("precious")
    with pytest.raises(AddressError, match="not a socket"):
        await Server("s", f"ipc://{other}").start()
    assert other.read_text() == "precious"


async def test_an_address_is_free_after_close(tmp_path: Path) -> None:
    address = "tcp://127.0.0.1:0"
    for _ in range(5):
        server = Server("s", address)
        address = await server.start()
        await server.close()
    path = f"ipc://{tmp_path}/s"
    for _ in range(5):
        server = Server("s", path)
        await server.start()
        await server.close()
    await server.close()  # twice does no harm


async def test_http_has_three_paths(serve: Serve, connect: Connect) -> None:
    health = [Health(alive=True, ready=False, reason="starting")]

    async def ack(call: Call, body: Body) -> Body:
        return Ack()

    registry = CollectorRegistry()
    server = await serve(("x", InfoRequest, ack), health=lambda: health[0], registry=registry)
    status = HttpStatus("127.0.0.1:0", server.health, registry)
    base = f"http://{await status.start()}"
    await connect(server).request("x", InfoRequest(), Ack, timeout_s=T)
    async with aiohttp.ClientSession() as session:

        async def get(path: str, method: str = "GET") -> tuple[int, str]:
            async with session.request(method, base + path) as response:
                return response.status, await response.text()

        assert await get("/healthz") == (200, "alive\n")
        assert await get("/readyz") == (503, "not ready: starting\n")
        health[0] = Health(alive=True, ready=True)
        assert await get("/readyz") == (200, "ready\n")
        code, text = await get("/metrics")
        assert code == 200 and 'igrpo_wire_accepted_total{service="test"} 1.0' in text
        assert 'igrpo_wire_malformed_total{service="test"} 0.0' in text and "igrpo_wire_sessions" in text
        for path in ("/", "/healthz/", "/metrics/x", "/../etc/passwd"):
            assert (await get(path))[0] == 404
        for method in ("POST", "PUT", "DELETE"):
            assert (await get("/healthz", method))[0] == 405
    with pytest.raises(AddressError, match=base.removeprefix("http://")):
        await HttpStatus(base.removeprefix("http://"), server.health, registry).start()
    await status.close()
    with pytest.raises(AddressError, match="host:port"):
        HttpStatus("8080", server.health, registry)


async def test_metrics_of_a_closed_server_are_gone(connect: Connect) -> None:
    registry = CollectorRegistry()
    server = Server("s", "tcp://127.0.0.1:0", registry=registry)
    client = connect(await server.start())
    await server.close()
    assert not list(registry.collect())
    await client.close()
    with pytest.raises(UnavailableError):
        await client.request("x", InfoRequest(), Ack, timeout_s=T)
