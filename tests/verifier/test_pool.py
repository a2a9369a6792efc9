"""The pool with its real worker processes: limits, kills, crashes, cancel, fairness, and nothing left behind."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from verifier.frames import Outcome, Task
from verifier.pool import Batch, Pool, PoolLimits, QueueFullError, StartError

GOLD = r"\sqrt{2}"
HANGS_IN_C = "9^{9^{9}}"
ADVERSARIAL = [
    HANGS_IN_C,
    "10^{10^{10}}",
    "1000000000!",
    r"\sum_{k=1}^{10^9} \frac{1}{k}",
    r"\binom{1000000}{500000}",
]


@asynccontextmanager
async def running_pool(**limits: Any) -> AsyncIterator[Pool]:
    pool = Pool(PoolLimits(**{"workers": 1, "spare_workers": 0, **limits}))
    await pool.start()
    try:
        yield pool
    finally:
        pids = pool.pids
        await pool.close()
        assert not any(alive(pid) for pid in pids)


async def collect(batch: Batch, timeout_s: float = 20.0) -> dict[int, Outcome]:
    outcomes: dict[int, Outcome] = {}
    async with asyncio.timeout(timeout_s):
        while batch.outstanding or batch._ready:
            for index, outcome in await batch.take():
                assert index not in outcomes
                outcomes[index] = outcome
    return outcomes


async def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110  (processes have no event to wait for)
            await asyncio.sleep(0.005)


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def tasks(*answers: str) -> list[Task]:
    return [Task("math", GOLD, answer) for answer in answers]


async def test_hard_limit_kills_and_neighbours_are_answered_quickly() -> None:
    """The soft limit is out of reach here: only the hard one can end these items."""
    limits = {
        "workers": 2,
        "spare_workers": 1,
        "long_runners": 5,
        "slow_after_s": 0.2,
        "soft_limit_s": 30.0,
        "hard_limit_s": 1.5,
    }
    async with running_pool(**limits) as pool:
        start = time.monotonic()
        slow = pool.submit(tasks(*ADVERSARIAL))
        ended: list[float] = []

        async def watch() -> dict[int, Outcome]:
            outcomes = await collect(slow)
            ended.append(time.monotonic() - start)
            return outcomes

        watching = asyncio.create_task(watch())
        await until(lambda: pool.busy == 2)
        easy = await collect(pool.submit(tasks(*[rf"\sqrt{{{2 + n % 2}}}" for n in range(20)])))
        easy_s = time.monotonic() - start
        outcomes = await watching
        assert {outcome.status for outcome in easy.values()} == {"correct", "wrong"}
        assert {outcome.status for outcome in outcomes.values()} == {"timeout"}
        assert easy_s < ended[0]
        assert all(outcome.seconds < 2.5 for outcome in outcomes.values())
        assert pool.counters.killed == 5
        assert pool.counters.aside == 5  # two places did not make five slow items wait for one another


async def test_soft_limit_interrupts_from_within() -> None:
    async with running_pool(soft_limit_s=0.3, hard_limit_s=10.0) as pool:
        outcomes = await collect(pool.submit(tasks(r"\binom{1000000}{500000}", GOLD)))
        assert outcomes[0].status == "timeout" and outcomes[0].detail.startswith("soft limit")
        assert outcomes[1].status == "correct"
        assert pool.counters.killed == 0


async def test_memory_limit_is_a_timeout_and_the_next_item_is_graded() -> None:
    greedy = (
        "from verifier import math, worker\n"
        "grade = math._grade\n"
        "math._grade = lambda gold, answer: bytes(1 << 30) if answer == 'greedy' else grade(gold, answer)\n"
        "worker.main()"
    )
    pool = Pool(PoolLimits(workers=1, memory_limit_mb=256), command=(sys.executable, "-c", greedy))
    await pool.start()
    try:
        outcomes = await collect(pool.submit(tasks("greedy", GOLD)))
    finally:
        await pool.close()
    assert (outcomes[0].status, outcomes[0].detail) == ("timeout", "memory limit")
    assert outcomes[1].status == "correct"


async def test_killed_worker_is_retried_once_elsewhere() -> None:
    async with running_pool(workers=1, soft_limit_s=0.5, hard_limit_s=2.0) as pool:
        batch = pool.submit(tasks(HANGS_IN_C, GOLD))
        await until(lambda: pool.busy == 1)
        [running] = pool._state.running
        os.kill(running.worker.pid, signal.SIGKILL)
        outcomes = await collect(batch)
        assert outcomes[0].status == "timeout"  # its second worker's soft limit, or the pool's hard limit
        assert outcomes[1].status == "correct"
        assert pool.counters.crashed == 1


async def test_twice_killed_is_an_error() -> None:
    async with running_pool(workers=1, soft_limit_s=20.0, hard_limit_s=30.0) as pool:
        batch = pool.submit(tasks(HANGS_IN_C))
        for _ in range(2):
            await until(lambda: pool.busy == 1)
            [running] = pool._state.running
            os.kill(running.worker.pid, signal.SIGKILL)
            await until(lambda killed=running: killed not in pool._state.running)
        outcomes = await collect(batch)
        assert outcomes[0] == Outcome("error", "worker died 2 times")


async def test_workers_killed_at_random_every_item_is_answered_once() -> None:
    async with running_pool(workers=2, spare_workers=1) as pool:
        batch = pool.submit(tasks(*[rf"\sqrt{{{n}}}+{n}x" for n in range(30)]))
        rng = random.Random(0)

        async def kill_three() -> None:
            for _ in range(3):
                served = batch.outstanding
                await until(lambda served=served: batch.outstanding < served or not batch.outstanding)
                if pool.pids:
                    os.kill(rng.choice(pool.pids), signal.SIGKILL)

        killing = asyncio.create_task(kill_three())
        outcomes = await collect(batch)
        await killing
        assert len(outcomes) == 30
        assert {outcome.status for outcome in outcomes.values()} <= {"wrong", "error"}
        assert sum(outcome.status == "error" for outcome in outcomes.values()) <= 1


async def test_killed_idle_worker_is_replaced() -> None:
    async with running_pool(workers=1, spare_workers=0) as pool:
        os.kill(pool.pids[0], signal.SIGKILL)
        await until(lambda: pool.counters.started == 2)
        assert (await collect(pool.submit(tasks(GOLD))))[0].status == "correct"


async def test_cancel_stops_queued_and_running_work() -> None:
    async with running_pool(workers=1, soft_limit_s=20.0, hard_limit_s=30.0, cancel_grace_s=0.05) as pool:
        batch = pool.submit(tasks(HANGS_IN_C, HANGS_IN_C, HANGS_IN_C))
        await until(lambda: pool.busy == 1)
        pool.cancel(batch)
        assert pool.queued == 0
        await until(lambda: pool.busy == 0, timeout_s=3.0)
        assert (await collect(pool.submit(tasks(GOLD))))[0].status == "correct"
        assert pool.counters.crashed == 0
        assert batch.outstanding == 3


async def test_queue_is_bounded_and_all_or_none() -> None:
    async with running_pool(workers=1, max_queued=3) as pool:
        with pytest.raises(QueueFullError):
            pool.submit(tasks(GOLD, GOLD, GOLD, GOLD))
        assert pool.queued == 0
        assert len(await collect(pool.submit(tasks(GOLD, GOLD, GOLD)))) == 3


async def test_recycled_after_its_items() -> None:
    async with running_pool(workers=1, recycle_after=2) as pool:
        outcomes = await collect(pool.submit(tasks(*[GOLD] * 3)))
        assert len(outcomes) == 3
        assert pool.counters.recycled == 1


async def test_workers_have_no_secrets_and_no_network() -> None:
    os.environ["VERIFIER_TEST_SECRET"] = "hush"
    try:
        async with running_pool() as pool:
            assert b"hush" not in read(f"/proc/{pool.pids[0]}/environ")
            ours, theirs = (os.readlink(f"/proc/{pid}/ns/net") for pid in ("self", pool.pids[0]))
            assert pool.isolated == (ours != theirs)
    finally:
        del os.environ["VERIFIER_TEST_SECRET"]


async def test_start_says_why_it_failed() -> None:
    pool = Pool(PoolLimits(workers=1, start_timeout_s=1.0), command=(sys.executable, "-c", "raise SystemExit(3)"))
    with pytest.raises(StartError, match="a worker does not start"):
        await pool.start()
    assert pool.pids == []


async def test_a_worker_that_speaks_nonsense_is_a_dead_one() -> None:
    nonsense = "import sys,time; sys.stdout.buffer.write(b'\\xff'*64); sys.stdout.flush(); time.sleep(60)"
    pool = Pool(PoolLimits(workers=1, start_timeout_s=1.0), command=(sys.executable, "-c", nonsense))
    with pytest.raises(StartError, match="exceeds"):
        await pool.start()
