"""Refinements go first, capacity is never exceeded, and no free place is withheld."""

from __future__ import annotations

import asyncio
import random

import pytest

from protocol.errors import OverloadedError
from rollout_server.admission import Admission, SampleClass


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_refinements_overtake_drafts_and_those_evaluations() -> None:
    admission = Admission(1, 100)
    order: list[tuple[SampleClass, int]] = []
    go = asyncio.Event()

    async def sample(kind: SampleClass, number: int) -> None:
        async with admission.place(kind):
            order.append((kind, number))
            await go.wait()

    first = asyncio.create_task(sample(SampleClass.GENERATE, 0))
    await settle()
    kinds = [SampleClass.GENERATE, SampleClass.DRAFT, SampleClass.REFINE] * 2
    rest = [asyncio.create_task(sample(kind, i)) for i, kind in enumerate(kinds)]
    await settle()
    assert (admission.running, admission.waiting) == (1, 6)
    go.set()
    await asyncio.gather(first, *rest)
    expected = [(SampleClass.REFINE, 2), (SampleClass.REFINE, 5), (SampleClass.DRAFT, 1), (SampleClass.DRAFT, 4)]
    assert order == [(SampleClass.GENERATE, 0), *expected, (SampleClass.GENERATE, 0), (SampleClass.GENERATE, 3)]


async def test_capacity_holds_and_places_return_under_random_cancels() -> None:
    admission, rng = Admission(3, 1000), random.Random(0)
    peak = 0

    async def sample() -> None:
        nonlocal peak
        async with admission.place(rng.choice(list(SampleClass))):
            peak = max(peak, admission.running)
            for _ in range(rng.randrange(4)):
                await asyncio.sleep(0)

    tasks = [asyncio.create_task(sample()) for _ in range(200)]
    for _ in range(60):
        rng.choice(tasks).cancel()
        await asyncio.sleep(0)
    await asyncio.gather(*tasks, return_exceptions=True)
    assert (admission.running, admission.waiting, peak) == (0, 0, 3)
    assert await admission.idle(0.0)


async def test_closed_twice_opens_only_when_both_have_opened() -> None:
    admission = Admission(2, 10)
    admission.close("pause")
    admission.close("drain")

    async def sample() -> None:
        async with admission.place(SampleClass.DRAFT):
            pass

    task = asyncio.create_task(sample())
    await settle()
    admission.open("drain")
    await settle()
    assert not task.done()
    admission.open("pause")
    await asyncio.wait_for(task, 1.0)


async def test_idle_waits_for_what_runs_and_the_queue_has_an_end() -> None:
    admission = Admission(1, 2)
    async with admission.place(SampleClass.DRAFT):
        assert not await admission.idle(0.01)
        waiting = [asyncio.create_task(admission.place(SampleClass.DRAFT).__aenter__()) for _ in range(2)]
        await settle()
        with pytest.raises(OverloadedError) as caught:
            admission.check_room(1)
        assert caught.value.retry_after_ms
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        admission.check_room(2)
    assert await admission.idle(1.0)
