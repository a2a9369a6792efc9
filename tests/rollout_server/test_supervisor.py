"""What the supervisor does when engines die or fail, on engines that are only told to."""

from __future__ import annotations

import asyncio
from collections import deque
from pathlib import Path
from typing import Any

import pytest

from protocol.errors import InternalError, StaleError, UnavailableError
from protocol.messages import UNVERSIONED, InfoRequest, UpdatePolicy, Version
from rollout_server import supervisor as module
from rollout_server.admission import Admission, SampleClass
from rollout_server.config import RolloutServerConfig
from rollout_server.engine import EngineSettings
from rollout_server.supervisor import EngineLostError, Supervisor

SETTINGS = EngineSettings(
    model_path="m", dtype="float32", trust_remote_code=False, device="cpu", capacity=4, context_tokens=0,
    max_total_tokens=0, seed=7,
)  # fmt: skip


class FakeEngine:
    """Ready at once, unless told to fail; dies by `kill`."""

    lives: list[FakeEngine]
    fail_start = False

    def __init__(self, settings: EngineSettings) -> None:
        self.settings = settings
        self.exited = asyncio.Event()
        self.last_lines = deque(["ValueError: what it died of"])
        self.context_tokens = 100
        self.updates: list[Version] = []
        self.fail_update: Exception | None = None

    @classmethod
    async def launch(cls, settings: EngineSettings) -> FakeEngine:
        cls.lives.append(cls(settings))
        return cls.lives[-1]

    async def wait_ready(self, timeout_s: float) -> None:
        if self.fail_start:
            raise UnavailableError("the engine went down (exit code 1)")

    async def update(self, path: str, version: Version, timeout_s: float) -> float:
        if self.fail_update:
            raise self.fail_update
        self.updates.append(version)
        return 0.5

    def kill(self) -> None:
        self.exited.set()

    async def close(self) -> None:
        self.kill()


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> type[FakeEngine]:
    class Engine(FakeEngine):
        lives: list[FakeEngine] = []  # noqa: RUF012 - one list per test is the point

    monkeypatch.setattr(module, "EngineProcess", Engine)
    return Engine


def supervisor(**config: Any) -> tuple[Supervisor, Admission]:
    admission = Admission(4, 100)
    settings = {"restart_backoff_s": 0.001, "drain_timeout_s": 0.05} | config
    return Supervisor(RolloutServerConfig.model_validate(settings), SETTINGS, admission), admission


async def ready(one: Supervisor) -> asyncio.Task[None]:
    task = asyncio.create_task(one.run())
    await asyncio.wait_for(one.first_ready.wait(), 5.0)
    return task


async def next_life(one: Supervisor) -> None:
    while one.state != "ready":
        await asyncio.wait_for(one.revision.wait(InfoRequest(one.revision.value, 5000)), 5.0)


async def test_a_first_start_that_fails_is_final(engines: type[FakeEngine]) -> None:
    engines.fail_start = True
    one, _ = supervisor()
    with pytest.raises(EngineLostError, match="what it died of"):
        await one.run()
    assert (one.state, len(engines.lives)) == ("failed", 1)


async def test_an_engine_that_dies_comes_back_unversioned_and_samples_anew(engines: type[FakeEngine]) -> None:
    one, _ = supervisor()
    task = await ready(one)
    await one.switch(Version(1, 4), Path("w"), UpdatePolicy.IN_FLIGHT)
    assert one.version == Version(1, 4)
    before = one.revision.value
    engines.lives[0].kill()
    await asyncio.wait_for(one.revision.wait(InfoRequest(before, 5000)), 5.0)
    with pytest.raises(UnavailableError):
        one.engine()
    await next_life(one)
    assert (one.version, one.restarts) == (UNVERSIONED, 1)
    assert [life.settings.seed for life in engines.lives] == [7, 8]
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert engines.lives[1].exited.is_set()


async def test_it_gives_up_after_max_restarts(engines: type[FakeEngine]) -> None:
    one, _ = supervisor(max_restarts=2)
    task = await ready(one)
    for _ in range(3):
        await next_life(one)
        before = one.revision.value
        engines.lives[-1].kill()
        await asyncio.wait_for(one.revision.wait(InfoRequest(before, 5000)), 5.0)
    with pytest.raises(EngineLostError, match="gave up after 2 restarts"):
        await asyncio.wait_for(task, 5.0)
    assert (one.state, len(engines.lives)) == ("failed", 3)


async def test_a_failure_inside_the_switch_kills_the_engine(engines: type[FakeEngine]) -> None:
    one, _ = supervisor()
    task = await ready(one)
    engines.lives[0].fail_update = InternalError("half of the weights")
    with pytest.raises(InternalError, match="half"):
        await one.switch(Version(1, 0), Path("w"), UpdatePolicy.IN_FLIGHT)
    assert engines.lives[0].exited.is_set()
    await asyncio.wait_for(one.revision.wait(InfoRequest(one.revision.value, 5000)), 5.0)  # it enters `starting`
    await next_life(one)
    assert one.version == UNVERSIONED
    await one.switch(Version(1, 0), Path("w"), UpdatePolicy.IN_FLIGHT)
    assert engines.lives[1].updates == [Version(1, 0)]
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_versions_only_grow_and_the_served_one_is_not_loaded_again(engines: type[FakeEngine]) -> None:
    one, _ = supervisor()
    task = await ready(one)
    for version in (Version(1, 5), Version(1, 5), Version(2, 0)):
        await one.switch(version, Path("w"), UpdatePolicy.IN_FLIGHT)
    with pytest.raises(StaleError):
        await one.switch(Version(1, 9), Path("w"), UpdatePolicy.IN_FLIGHT)
    assert engines.lives[0].updates == [Version(1, 5), Version(2, 0)]
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_drain_that_takes_too_long_leaves_the_old_weights_serving(engines: type[FakeEngine]) -> None:
    one, admission = supervisor()
    task = await ready(one)
    async with admission.place(SampleClass.DRAFT):
        with pytest.raises(UnavailableError, match="1 samples still run"):
            await one.switch(Version(1, 1), Path("w"), UpdatePolicy.DRAIN)
        assert (one.version, one.state) == (UNVERSIONED, "ready")
        async with admission.place(SampleClass.DRAFT):
            pass  # admission goes on
    await one.switch(Version(1, 1), Path("w"), UpdatePolicy.DRAIN)
    assert one.version == Version(1, 1)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
