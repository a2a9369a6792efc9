"""The whole trainer, in processes of its own: recorded batches in, checked weights and a model folder out."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from protocol.clients import TrainerClient
from protocol.errors import InvalidError, RefusedError, StaleError
from protocol.messages import PushReceived, PushRequest, StepDone, TrainerHello, TrainGroup, Version
from tests.tiny_model import make_tiny_model
from tests.trainer.recorded import ENVIRONMENT, load_float64, logprobs, recorded_push
from tests.trainer.servers import CheckingReplica, Membership

WORKER = Path(__file__).with_name("service_worker.py")


class Trainer:
    """A running trainer, with one replica to publish to."""

    def __init__(self, folder: Path, model: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        self.model = model
        self.ranks = settings.get("processes", 1)
        self.settings = {"address": f"ipc://{folder}/trainer.sock"} | settings
        self.max_staleness = self.settings.pop("max_staleness", 2)
        self.settings["publish"] = {"poll_s": 0.1} | settings.get("publish", {})
        self.replica = CheckingReplica("replica")
        self.membership = Membership("run")

    async def open(self) -> None:
        address = await self.membership.server.start()
        self.membership.set(await self.replica.start())
        path = self.folder / "settings.json"
        everything = {
            "trainer": self.settings,
            "model": {"path": str(self.model), "dtype": "float32"},
            "run": {"name": "run", "dir": str(self.folder), "steps": 10, "max_staleness": self.max_staleness},
            "orchestrator": address,
        }
        path.write_text(json.dumps(everything))
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self.ranks}"]
        self.process = await asyncio.create_subprocess_exec(
            sys.executable,
            *(torchrun if self.ranks > 1 else []),
            str(WORKER),
            str(path),
            env=ENVIRONMENT,
            stdout=asyncio.subprocess.PIPE,
            stderr=(self.folder / "stderr.txt").open("wb"),
        )
        self.client = TrainerClient(await self._ready(), run="run", term=1)

    async def _ready(self) -> str:
        assert self.process.stdout is not None
        async with asyncio.timeout(90.0):
            async for line in self.process.stdout:
                if line.startswith(b"ready trainer "):
                    return line.decode().split()[2]
        raise AssertionError((self.folder / "stderr.txt").read_text())

    async def push(self, push: PushRequest) -> StepDone:
        replies = [reply async for reply in self.client.push(push, timeout_s=60.0)]
        assert [type(reply) for reply in replies] == [PushReceived, StepDone]
        assert isinstance(replies[-1], StepDone)
        return replies[-1]

    async def ends(self, timeout_s: float = 30.0) -> int:
        assert self.process.stdout is not None
        async with asyncio.timeout(timeout_s):
            await self.process.stdout.read()
            return await self.process.wait()

    async def close(self) -> None:
        await self.client.close()
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        await self.process.wait()
        await self.membership.server.close()
        await self.replica.server.close()


@contextlib.asynccontextmanager
async def trainer(folder: Path, **settings: Any) -> AsyncIterator[Trainer]:
    running = Trainer(folder, make_tiny_model(folder / "model"), settings)
    try:
        await running.open()
        yield running
    finally:
        await running.close()


async def test_train_publish_and_export(tmp_path: Path) -> None:
    async with trainer(tmp_path, optimizer={"learning_rate": 1e-3}) as running:
        client, replica = running.client, running.replica
        state = await client.hello(TrainerHello(run="run", term=1), timeout_s=10.0)
        assert (state.version, state.next_step, state.state) == (Version(1, 0), 0, "waiting")
        await replica.serves(Version(1, 0))
        await _checks_what_comes_in(running)

        for step in range(3):
            push = recorded_push(step=step, lag=min(step, 2), first=6 * step, seed=step)
            done, again = await asyncio.gather(running.push(push), running.push(push))
            assert done == again, "the same push twice is one push"
            assert done.version == Version(1, step + 1)
            assert done.metrics["lag_max"] == min(step, 2) and np.isfinite(list(done.metrics.values())).all()
            await replica.serves(Version(1, step + 1))
        state = await client.info(timeout_s=10.0)
        assert state.next_step == 3 and state.published == Version(1, 3)
        assert state.ledger == [(0, index) for index in range(18)]
        with pytest.raises(RefusedError, match="trained already"):
            await running.push(recorded_push(step=3))

        finished = await client.finish(timeout_s=60.0)
        assert finished.version == Version(1, 3)
        assert await running.ends() == 0
        _check_export(Path(finished.path), replica, running.model)
        file = json.loads((tmp_path / "run/trainer/incarnation.json").read_text())
        assert file == {"incarnation": 1, "branch_steps": [0]}


async def _checks_what_comes_in(running: Trainer) -> None:
    good = recorded_push()
    for bad, error in (
        (recorded_push(incarnation=2), RefusedError),
        (recorded_push(step=1), RefusedError),
        (recorded_push(step=0, incarnation=3), RefusedError),
        (_with(good, temperature=0.0), InvalidError),
    ):
        with pytest.raises(error):
            await running.push(bad)


def _with(push: PushRequest, **changes: Any) -> PushRequest:
    first = msgspec.structs.replace(push.groups[0], **changes)
    return msgspec.structs.replace(push, groups=[first, *push.groups[1:]])


def _check_export(path: Path, replica: CheckingReplica, model: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    exported = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    loaded = dict(exported.named_parameters())
    assert loaded.keys() == replica.weights.keys()
    assert all(torch.equal(loaded[name], replica.weights[name]) for name in loaded)
    assert not all(torch.equal(p, loaded[name].double()) for name, p in load_float64(model).named_parameters())
    assert AutoTokenizer.from_pretrained(path).encode("12 + 7") == AutoTokenizer.from_pretrained(model).encode("12 + 7")


async def test_two_ranks_zero3_adapters_over_disk(tmp_path: Path) -> None:
    settings = {
        "processes": 2,
        "max_staleness": 1,
        "deepspeed": {"zero_stage": 3, "persistent_parameter_elements": 0},
        "lora": {"rank": 4},
        "publish": {"transport": "disk", "bucket_mb": 1},
        "deadlines": {"idle_s": 0.2},
        "optimizer": {"learning_rate": 1e-2},
    }
    async with trainer(tmp_path, **settings) as running:
        await asyncio.sleep(0.5)  # the other rank hears `no batch yet` meanwhile
        for step in range(2):
            done = await running.push(recorded_push(step=step, first=6 * step))
            assert done.metrics["gradient_norm"] > 0
        await running.replica.serves(Version(1, 2))
        with pytest.raises(StaleError):
            await running.push(recorded_push(step=2, lag=2, first=12))
        done = await running.push(_as_served(running, recorded_push(step=2, first=12)))
        assert done.metrics["mismatch"] < 1e-5, "what is served is what is trained, at both temperatures"
        assert done.metrics["mismatch_max_ratio"] == pytest.approx(1.0, abs=1e-4)
        await running.replica.serves(Version(1, 3))
        finished = await running.client.finish(timeout_s=60.0)
        assert await running.ends() == 0
        _check_export(Path(finished.path), running.replica, running.model)
        assert not list((tmp_path / "run/weights").iterdir()), "the export is the one copy that stays"


def _as_served(running: Trainer, push: PushRequest) -> PushRequest:
    """The push with the log-probs that transformers computes in float64 on the weights that are served."""
    model = load_float64(running.model)
    model.load_state_dict({name: tensor.double() for name, tensor in running.replica.weights.items()}, strict=False)
    replace = msgspec.structs.replace

    def scored(group: TrainGroup) -> TrainGroup:
        with torch.no_grad():
            served = [logprobs(model, group, sample).float().numpy() for sample in group.samples]
        samples = [replace(sample, logprobs=lp) for sample, lp in zip(group.samples, served, strict=True)]
        return replace(group, samples=samples)

    return replace(push, groups=[scored(group) for group in push.groups])


async def test_sigterm_ends_it_within_seconds(tmp_path: Path) -> None:
    async with trainer(tmp_path) as running:
        running.process.send_signal(signal.SIGTERM)
        assert await running.ends(10.0) == 0


@pytest.mark.parametrize("victim", ["agent", pytest.param("rank", marks=pytest.mark.slow)])
async def test_ranks_die_together(tmp_path: Path, victim: str) -> None:
    async with trainer(tmp_path, processes=2) as running:
        agent = running.process.pid
        children = _children(agent)
        assert len(children) == 2
        os.kill(agent if victim == "agent" else children[1], signal.SIGKILL)
        assert await running.ends(40.0) != 0
        # `ends` has read their stdout, which they share with the agent, to its end
        assert not any(_alive(pid) for pid in children)


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _alive(pid: int) -> bool:
    try:
        return ") Z" not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        ("missing", {}, "trainer: model.path: {folder}/missing is no model folder"),
        ("model", {"address": "tcp://192.0.2.1:0", "insecure": True}, "trainer: cannot listen: tcp://192.0.2.1:0"),
    ],
)
async def test_errors_name_the_place(tmp_path: Path, model: str, settings: dict[str, Any], message: str) -> None:
    make_tiny_model(tmp_path / "model")
    running = Trainer(tmp_path, tmp_path / model, settings)
    with pytest.raises(AssertionError) as error:
        await running.open()
    assert str(error.value).splitlines()[-1].startswith(message.format(folder=tmp_path))
    assert await running.process.wait() == 1
    await running.membership.server.close()
    await running.replica.server.close()
