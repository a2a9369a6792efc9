"""SGLang's log-probs are the trainer's on the same tokens and weights, at two temperatures in one batch.

The trainer's side is its own packing, scorer and op; the engine's is the real one, before and after a change of weights
and for samples that a change of weights caught in the middle.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from protocol.clients import RolloutClient
from protocol.config import ModelConfig
from protocol.messages import DraftRequest, PushRequest, Sample, Sampling, TrainGroup, TrainSample, Version, WeightsLoad
from tests.rollout_server.serving import CALL_S, ServerProcess, collect, drafts, question, until_running
from tests.tiny_model import make_tiny_model
from trainer.batch import batch_of
from trainer.model import load_policy
from trainer.packing import pack

TEMPERATURES = (0.7, 1.0)
TOLERANCE = 1e-4  # fp32; 3e-6 is usual, the rest is room for other processors


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("engine")
    for seed in (0, 1):
        make_tiny_model(folder / f"model{seed}", seed=seed)
    server = ServerProcess(folder, folder / "model0", capacity=32)
    try:
        server.wait_ready()
        yield server
    finally:
        server.end()


async def sampled(client: RolloutClient, tokens: int) -> list[TrainGroup]:
    """One group per temperature, generated at the same time."""

    async def one(index: int, temperature: float) -> TrainGroup:
        sampling = Sampling(max_new_tokens=tokens, temperature=temperature)
        request = DraftRequest(n=3, sampling=sampling, messages=question(f"What is {index} + 12?"))
        samples, done = await drafts(client, request)
        return group(index, samples, done.prompt_ids, temperature)

    return list(await asyncio.gather(*(one(index, t) for index, t in enumerate(TEMPERATURES))))


def group(index: int, samples: list[Sample], prompt_ids: np.ndarray, temperature: float) -> TrainGroup:
    train = [
        TrainSample(index=s.index, output_ids=s.output_ids, logprobs=s.logprobs, versions=s.versions, reward=0.0)
        for s in samples
    ]
    return TrainGroup(epoch=0, index=index, attempt=1, prompt_ids=prompt_ids, samples=train, temperature=temperature)


def trainer_logprobs(model: Path, groups: list[TrainGroup]) -> tuple[np.ndarray, np.ndarray]:
    """(the trainer's log-probs, the engine's), of all tokens of all groups in one packed micro-batch."""
    batch = batch_of(PushRequest(incarnation=1, step=0, groups=groups))
    config = ModelConfig(path=str(model), dtype="float32")
    scorer = load_policy(config, lora=None, activation_checkpointing=False, device=torch.device("cpu"))
    with torch.no_grad():
        ours, _ = scorer(pack(batch, list(range(batch.samples))))
    return ours.numpy(), batch.behaviour


async def test_before_and_after_a_change_of_weights(server: ServerProcess) -> None:
    folder = server.log.parent
    async with RolloutClient(server.address) as client:
        for version, model in ((None, folder / "model0"), (Version(1, 1), folder / "model1")):
            if version is not None:
                await client.weights_load(WeightsLoad(version=version, path=str(model)), timeout_s=CALL_S)
            groups = await sampled(client, 24)
            ours, theirs = trainer_logprobs(model, groups)
            assert len(ours) > 100
            assert np.abs(ours - theirs).max() <= TOLERANCE
            other = folder / ("model1" if version is None else "model0")
            assert np.abs(trainer_logprobs(other, groups)[0] - theirs).max() > 0.1, "the test can tell models apart"


async def test_each_token_is_of_the_version_that_it_carries(server: ServerProcess) -> None:
    """Weights change in mid-sequence: before the switch the log-probs are the old policy's, after it the new one's."""
    folder = server.log.parent
    async with RolloutClient(server.address) as client:
        start = (await client.info(timeout_s=CALL_S)).version
        old_model, new_model = (folder / "model1", folder / "model0")
        if start != Version(1, 1):
            await client.weights_load(WeightsLoad(version=Version(1, 1), path=str(old_model)), timeout_s=CALL_S)
        sampling = Sampling(max_new_tokens=1200)
        request = DraftRequest(n=4, sampling=sampling, messages=question())
        running = asyncio.create_task(collect(client.draft(request, timeout_s=CALL_S)))
        await until_running(client, 4)
        await client.weights_load(WeightsLoad(version=Version(1, 2), path=str(new_model)), timeout_s=CALL_S)
        samples, done = await running
    mixed = [s for s in samples if len(s.versions) == 2]
    assert mixed, "the change caught at least one sample in the middle"
    groups = [group(0, mixed, done.prompt_ids, 1.0)]
    (old, theirs), (new, _) = (trainer_logprobs(model, groups) for model in (old_model, new_model))
    expected, at = [], 0
    for sample in mixed:
        cut = at + sample.versions[0].end
        expected += [old[at:cut], new[cut : at + len(sample.output_ids)]]
        at += len(sample.output_ids)
    assert np.abs(np.concatenate(expected) - theirs).max() <= TOLERANCE
