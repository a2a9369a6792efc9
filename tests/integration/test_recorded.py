"""On recorded rollouts: S = 0 equals a synchronous run bit for bit, and N = 0 equals plain GRPO bit for bit.

The asynchronous side is the real orchestrator and the real trainer over the wire, with a fake rollout server that
replays recorded samples. The synchronous side is a loop of a few lines that feeds the same trainer.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from protocol.clients import OrchestratorClient, TrainerClient
from protocol.messages import (
    InfoRequest,
    OrchestratorInfo,
    PushRequest,
    Sample,
    StepDone,
    TrainerHello,
    TrainGroup,
    TrainSample,
    Version,
)
from protocol.server import Call, Server
from tests.fakes import PROMPT_BASE, FakeRollout, FakeVerifier, recorded_sample
from tests.integration.services import service, write_config
from tests.tiny_model import make_tiny_model

STEPS, P, N, G, ROWS, VOCABULARY = 3, 2, 2, 4, 6, 50


def config_of(folder: Path, drafts: int) -> Path:
    make_tiny_model(folder / "model")
    rows = [json.dumps({"prompt": str(index), "answer": str(index)}) for index in range(ROWS)]
    (folder / "train.jsonl").write_text("\n".join(rows))
    return write_config(
        folder,
        {
            "run": {"name": "r", "dir": str(folder / "runs"), "steps": STEPS, "max_staleness": 0},
            "model": {"path": str(folder / "model"), "dtype": "float32"},
            "orchestrator": {
                "address": f"ipc://{folder}/o",
                "data": {"train": str(folder / "train.jsonl"), "shuffle": False},
                "prompts_per_step": P,
                "drafts": drafts,
                "refinements": G,
                "selection": {"rule": "best" if drafts else "none"},
            },
            "verifier": {"address": f"ipc://{folder}/v"},
            "trainer": {
                "address": f"ipc://{folder}/t",
                "optimizer": {"learning_rate": 1e-3},
                "deepspeed": {"zero_stage": 0},
                "minibatches_per_step": 2,
                "publish": {"transport": "disk"},
            },
        },
    )


async def streamed(folder: Path, drafts: int) -> None:
    """The run as it is: orchestrator and trainer as services."""
    config = config_of(folder, drafts)
    replica, verifier = FakeRollout("r0", vocabulary=VOCABULARY), FakeVerifier()
    await replica.start(f"ipc://{folder}/r")
    await verifier.start(f"ipc://{folder}/v")
    client = OrchestratorClient(f"ipc://{folder}/o")
    try:
        async with service("trainer", config), service("orchestrator", config) as orchestrator:
            await replica.register(client)
            async with asyncio.timeout(120):
                assert orchestrator.stdout is not None
                output = await orchestrator.stdout.read()
                assert await orchestrator.wait() == 0, output
    finally:
        await client.close()
        await replica.server.close()
        await verifier.server.close()


def correct(sample: Sample) -> float:
    return float(int(sample.text[-2]) % 2 == 0)


def group_of(index: int, step: int, drafts: int) -> TrainGroup:
    """What one prompt becomes when everything is done one after another."""
    version = Version(1, step)
    prompt = [PROMPT_BASE % VOCABULARY, *(ord(c) % VOCABULARY for c in str(index))]
    if drafts:
        stage1 = [recorded_sample(f"{prompt}", i, version, vocabulary=VOCABULARY) for i in range(drafts)]
        prompt = prompt + max(stage1, key=correct).output_ids.tolist()
    stage2 = [recorded_sample(f"{prompt}", i, version, vocabulary=VOCABULARY) for i in range(G)]
    samples = [
        TrainSample(index=s.index, output_ids=s.output_ids, logprobs=s.logprobs, versions=s.versions, reward=correct(s))
        for s in stage2
    ]
    return TrainGroup(
        epoch=0, index=index, attempt=1, prompt_ids=np.array(prompt, np.int32), samples=samples, temperature=1.0
    )


async def synchronous(folder: Path, drafts: int) -> None:
    """The same prompts in the same order, one batch after another, straight into the trainer."""
    config = config_of(folder, drafts)
    server = Server("orchestrator", f"ipc://{folder}/o")

    async def info(call: Call, body: InfoRequest) -> OrchestratorInfo:
        return OrchestratorInfo(revision=0, run="r", term=1, replicas=[], state="training")

    server.route("info", InfoRequest, info, control=True)
    await server.start()
    trainer = TrainerClient(f"ipc://{folder}/t", run="r", term=1)
    try:
        async with service("trainer", config):
            assert (await trainer.hello(TrainerHello(run="r", term=1), timeout_s=60)).version == Version(1, 0)
            for step in range(STEPS):
                groups = [group_of(index, step, drafts) for index in range(step * P, (step + 1) * P)]
                replies = trainer.push(PushRequest(incarnation=1, step=step, groups=groups), timeout_s=60)
                async for reply in replies:
                    if isinstance(reply, StepDone):
                        assert reply.version == Version(1, step + 1)
                        assert reply.metrics["gradient_norm"] > 0
            await trainer.finish(timeout_s=60)
    finally:
        await trainer.close()
        await server.close()


def weights(folder: Path) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    for path in sorted((folder / "runs" / "r" / "export").glob("*.safetensors")):
        tensors |= safetensors.numpy.load_file(path)
    return tensors


@pytest.mark.parametrize("drafts", [N, 0], ids=["igrpo", "plain_grpo"])
async def test_streaming_with_no_staleness_is_synchronous_bit_for_bit(tmp_path: Path, drafts: int) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    await asyncio.gather(streamed(folders[0], drafts), synchronous(folders[1], drafts))
    ours, theirs = map(weights, folders)
    start = safetensors.numpy.load_file(folders[0] / "model" / "model.safetensors")
    assert ours.keys() == theirs.keys() and ours
    moved = [name for name in ours if not np.array_equal(ours[name], start[name])]
    assert moved, "training changed nothing"
    for name in ours:
        assert ours[name].tobytes() == theirs[name].tobytes(), name
