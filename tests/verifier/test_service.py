"""The service end to end, through the protocol's own client: statuses, streaming, cancel, deadline, overload, death."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from protocol.clients import VerifierClient
from protocol.errors import DeadlineError, InvalidError, OverloadedError
from protocol.messages import InfoRequest, Verdict, VerifyItem, VerifyReply, VerifyRequest
from protocol.server import Server
from tests.verifier.test_pool import GOLD, HANGS_IN_C, alive, until
from verifier.config import VerifierConfig
from verifier.service import VerifierService

BOX = r"so \boxed{%s}"
PROBE = """
import sys
from protocol.config import RunConfig
from verifier.config import VerifierConfig
from verifier.service import main
sys.exit(main(VerifierConfig(address=sys.argv[1], http_address=sys.argv[2], workers=1), RunConfig()))
"""


class Running:
    """A service in this process, and a client of it."""

    def __init__(self, service: VerifierService, client: VerifierClient, registry: CollectorRegistry) -> None:
        self.service = service
        self.client = client
        self.registry = registry

    async def grade(self, *pairs: tuple[str, str], timeout_s: float = 20.0) -> list[Verdict]:
        items = [item(str(index), reference, completion) for index, (reference, completion) in enumerate(pairs)]
        return await self.client.verify(items, timeout_s=timeout_s)


def item(name: str, reference: str, completion: str) -> VerifyItem:
    return VerifyItem(id=name, completion=completion, reference=reference)


@asynccontextmanager
async def serving(**settings: Any) -> AsyncIterator[Running]:
    registry = CollectorRegistry()
    service = VerifierService(VerifierConfig(**{"workers": 1, "spare_workers": 0, **settings}), "verifier", registry)
    server = Server("verifier", "tcp://127.0.0.1:0", health=service.health, registry=registry)
    server.route("verify", VerifyRequest, service.verify)
    server.route("info", InfoRequest, service.info, control=True)
    await service.pool.start()
    client = VerifierClient(await server.start())
    try:
        yield Running(service, client, registry)
    finally:
        await client.close()
        await server.close()
        pids = service.pool.pids
        await service.pool.close()
        assert not any(alive(pid) for pid in pids)


async def test_every_status_in_the_order_of_items() -> None:
    async with serving(soft_limit_s=0.5, hard_limit_s=1.5, max_answer_chars=50, max_completion_chars=10_000) as running:
        cases = [
            (GOLD, BOX % HANGS_IN_C, "timeout", ""),
            ("12", BOX % "12", "correct", "plain numbers"),
            ("12", BOX % "13", "wrong", "plain numbers"),
            ("12", BOX % "3+9", "wrong", "not one evaluated number"),
            (GOLD, BOX % "2^{1/2}", "correct", "math-verify"),
            (GOLD, BOX % "2", "wrong", "math-verify"),
            (GOLD, "it is 2", "no_answer", "no_box"),
            (GOLD, r"\boxed{\sqrt{2}} \boxed{\sqrt", "unparsable", "unterminated_box"),
            (GOLD, BOX % r"\frac{", "unparsable", ""),
            (GOLD, BOX % ("1" * 51), "unparsable", "answer of more than 50"),
            (GOLD, "x" * 10_001, "unparsable", "completion of more than 10000"),
            ("{", BOX % "3", "error", "bad_reference"),
            (" ", BOX % "3", "error", "bad_reference"),
        ]
        verdicts = await running.grade(*[(reference, completion) for reference, completion, _, _ in cases])
        assert [verdict.id for verdict in verdicts] == [str(index) for index in range(len(cases))]
        for (_, _, status, detail), verdict in zip(cases, verdicts, strict=True):
            assert verdict.status == status, verdict
            assert verdict.detail.startswith(detail), verdict
            assert verdict.score == (1.0 if status == "correct" else 0.0)
        assert verdicts[4].extracted == "2^{1/2}" and verdicts[4].seconds > 0
        assert verdicts[4].parts == {"format": 1.0} and verdicts[7].parts == {"format": 0.0}
        info = await running.client.info(timeout_s=5)
        assert sum(info.statuses.values()) == len(cases) and info.tasks == ["math"]
        assert b'verifier_verdicts_total{source="worker",status="timeout"} 1.0' in generate_latest(running.registry)


async def test_verdicts_stream_before_a_slow_item_ends() -> None:
    async with serving(workers=2, soft_limit_s=20.0, hard_limit_s=2.0 + 20.0) as running:
        items = [item("slow", GOLD, BOX % HANGS_IN_C), item("number", "1", BOX % "1"), item("easy", GOLD, BOX % GOLD)]
        request = VerifyRequest(items=items)
        replies = running.client.stream("verify", request, VerifyReply, VerifyReply, timeout_s=20)
        got: set[str] = set()
        async for reply in replies:
            got |= {verdict.id for verdict in reply.verdicts}
            if got == {"number", "easy"}:
                break
        await replies.aclose()  # cancels: the slow item's worker is killed
        await until(lambda: running.service.pool.busy == 0, timeout_s=3.0)


async def test_deadline_stops_the_work() -> None:
    async with serving(soft_limit_s=20.0, hard_limit_s=22.0) as running:
        with pytest.raises(DeadlineError):
            await running.grade((GOLD, BOX % HANGS_IN_C), (GOLD, BOX % HANGS_IN_C), timeout_s=0.5)
        await until(lambda: running.service.pool.busy == 0 and running.service.pool.queued == 0, timeout_s=3.0)
        [verdict] = await running.grade((GOLD, BOX % GOLD))
        assert verdict.status == "correct"


async def test_repeated_answers_come_from_the_cache() -> None:
    async with serving() as running:
        first = await running.grade((GOLD, BOX % "2^{1/2}"))
        again = await running.grade((GOLD, "another way: " + BOX % "2^{1/2}"))
        assert first[0].status == again[0].status == "correct"
        assert again[0].seconds == 0.0
        assert b'verifier_verdicts_total{source="cache",status="correct"} 1.0' in generate_latest(running.registry)


async def test_what_cannot_be_graded_is_refused() -> None:
    async with serving(max_queued=2) as running:
        with pytest.raises(InvalidError, match="unknown task 'poetry'"):
            await running.client.verify([VerifyItem(id="1", completion="", reference="1", task="poetry")], timeout_s=5)
        with pytest.raises(InvalidError, match="repeat"):
            await running.client.verify([item("1", "1", ""), item("1", "1", "")], timeout_s=5)
        with pytest.raises(InvalidError, match="3 items"):
            await running.grade(*[("1", "")] * 3)


async def test_full_queue_is_overloaded_and_plain_numbers_still_pass() -> None:
    async with serving(max_queued=2, long_runners=0, soft_limit_s=20.0, hard_limit_s=22.0) as running:
        first = asyncio.create_task(running.grade((GOLD, BOX % HANGS_IN_C), (GOLD, BOX % GOLD)))
        await until(lambda: running.service.pool.busy == 1)
        registry = running.registry
        request = VerifyRequest(items=[item("1", GOLD, BOX % "1"), item("2", GOLD, BOX % "2")])
        with pytest.raises((OverloadedError, DeadlineError)):  # the client may try again until its time is up
            await running.client.request("verify", request, VerifyReply, timeout_s=0.5)
        assert registry.get_sample_value("verifier_overloaded_total")
        [verdict] = await running.grade(("1", BOX % "1"))
        assert verdict.status == "correct"
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        await until(lambda: running.service.pool.busy == 0, timeout_s=3.0)


async def test_a_thousand_plain_numbers_need_no_worker() -> None:
    async with serving() as running:
        pairs = [(str(n), f"{n}-0=" + BOX % n) for n in range(1000)]
        start = time.monotonic()
        verdicts = await running.grade(*pairs)
        assert all(verdict.status == "correct" for verdict in verdicts)
        assert time.monotonic() - start < 2.0  # about 0.05 s on a quiet machine
        assert running.service.pool.counters.started >= 1 and running.service.pool.busy == 0


async def start_process(address: str, http: str = "") -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-c", PROBE, address, http,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, cwd=Path(__file__).parents[2],
    )  # fmt: skip


async def ready(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    async with asyncio.timeout(30):
        line = (await process.stdout.readline()).decode().split()
    assert line[:2] == ["ready", "verifier"]
    return line[2]


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


async def test_sigterm_ends_the_process_and_its_workers(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        http = f"127.0.0.1:{free.getsockname()[1]}"
    process = await start_process(f"ipc://{tmp_path}/v", http)
    client = VerifierClient(await ready(process))
    try:
        [verdict] = await client.verify([item("1", GOLD, BOX % GOLD)], timeout_s=10)
        assert verdict.status == "correct"
        page = await asyncio.to_thread(lambda: urllib.request.urlopen(f"http://{http}/metrics", timeout=5).read())
        assert b"verifier_workers_live" in page
        workers = children(process.pid)
        assert workers
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(10):
            assert await process.wait() == 0
        assert not any(alive(pid) for pid in workers)
    finally:
        await client.close()


async def test_kill_9_of_the_service_leaves_no_process(tmp_path: Path) -> None:
    process = await start_process(f"ipc://{tmp_path}/v")
    client = VerifierClient(await ready(process))
    try:
        hangs = [item("1", GOLD, BOX % HANGS_IN_C), item("2", GOLD, BOX % HANGS_IN_C)]
        hanging = asyncio.create_task(client.verify(hangs, timeout_s=20))
        async with asyncio.timeout(10):
            while (await client.info(timeout_s=5)).queued != 1:  # the second waits: the first is at work
                pass
        workers = children(process.pid)
        os.kill(process.pid, signal.SIGKILL)
        await until(lambda: not any(alive(pid) for pid in workers), timeout_s=3.0)
        hanging.cancel()
        await asyncio.gather(hanging, return_exceptions=True)
    finally:
        await client.close()
        await process.wait()


async def test_address_in_use_is_one_line(tmp_path: Path) -> None:
    async with serving() as running:
        process = await start_process(running.client.address)
        async with asyncio.timeout(30):
            _, stderr = await process.communicate()
        assert process.returncode == 1
        assert "address in use" in stderr.decode().strip().splitlines()[-1]


async def test_the_service_starts_without_torch_and_without_sympy() -> None:
    code = (
        "import sys, verifier.service as s; print([m for m in ('torch', 'sympy', 'math_verify') if m in sys.modules])"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE, cwd=Path(__file__).parents[2]
    )
    async with asyncio.timeout(30):
        stdout, _ = await process.communicate()
    assert stdout.decode().strip() == "[]"
