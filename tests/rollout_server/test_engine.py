"""The real SGLang on CPU behind the real server: behaviour log-probs, versions, weights, cancels, deaths.

One server for all tests that leave it alive; the last two kill parts of it.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from protocol.clients import RolloutClient
from protocol.errors import DeadlineError, InvalidError, RefusedError, StaleError, UnavailableError
from protocol.messages import (
    UNVERSIONED,
    Ack,
    DraftRequest,
    FinishReason,
    GenerateRequest,
    RefineRequest,
    ReplicaHello,
    ReplicaWelcome,
    Sample,
    Sampling,
    UpdatePolicy,
    Version,
    WeightsAbort,
    WeightsBegin,
    WeightsChunk,
    WeightsCommit,
    WeightsLoad,
)
from protocol.server import Server
from rollout_server.config import IMPROVE_REQUEST
from tests.rollout_server.serving import (
    CALL_S,
    ServerProcess,
    collect,
    drafts,
    question,
    stream_weights,
    tensors_of,
    until_idle,
    until_running,
)
from tests.tiny_model import make_tiny_model, make_tokenizer

LOGPROB_TOLERANCE = 1e-4
"""Between SGLang and transformers on the same float32 weights and tokens; seen: 3e-6."""

LONG = Sampling(max_new_tokens=1500)


@dataclass
class Replica:
    folder: Path
    model: Path  # served as (0, 0)
    other: Path
    server: ServerProcess
    version: Version = UNVERSIONED

    def next_version(self) -> Version:
        self.version = Version(max(1, self.version.incarnation), self.version.step + 1)
        return self.version


@pytest.fixture(scope="module")
def replica(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replica]:
    folder = tmp_path_factory.mktemp("rollout")
    model, other = make_tiny_model(folder / "a"), make_tiny_model(folder / "b", seed=1)
    server = ServerProcess(
        folder, model, f"ipc://{folder}/orchestrator.sock",
        template="multi_turn", capacity=32, heartbeat_s=0.2, restart_backoff_s=0.05, http_address="127.0.0.1:0",
    )  # fmt: skip
    try:
        server.wait_ready()
        yield Replica(folder, model, other, server)
    finally:
        server.end()


@pytest.fixture
async def client(replica: Replica) -> AsyncGenerator[RolloutClient]:
    client = RolloutClient(replica.server.address)
    replica.version = (await client.info(timeout_s=CALL_S)).version
    try:
        yield client
    finally:
        await client.close()


@functools.cache
def reference(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def forward_logprobs(folder: Path, prompt: np.ndarray, sample: Sample, temperature: float) -> np.ndarray:
    """Log-probs of the sample's tokens by transformers, of the temperature-scaled distribution."""
    import torch

    sequence = torch.tensor(np.concatenate([prompt, sample.output_ids]))[None].long()
    with torch.no_grad():
        logp = torch.log_softmax(reference(folder)(sequence).logits[0].float() / temperature, -1)
    return logp[:-1].gather(1, sequence[0, 1:, None])[len(prompt) - 1 :, 0].numpy()


def request(n: int, sampling: Sampling, text: str = "What is 12 + 7 * 3?", **more: Any) -> DraftRequest:
    return DraftRequest(n=n, sampling=sampling, messages=question(text), **more)


async def load(client: RolloutClient, replica: Replica, folder: Path, **more: Any) -> Version:
    body = WeightsLoad(version=replica.next_version(), path=str(folder), **more)
    return (await client.weights_load(body, timeout_s=CALL_S)).version


async def test_logprobs_equal_transformers_at_two_temperatures_in_one_batch(
    client: RolloutClient, replica: Replica
) -> None:
    await load(client, replica, replica.model)
    runs = {t: request(4, Sampling(max_new_tokens=48, temperature=t), f"at {t}") for t in (0.7, 1.0)}
    results = await asyncio.gather(*(drafts(client, run) for run in runs.values()))
    for temperature, (samples, done) in zip(runs, results, strict=True):
        assert [s.index for s in samples] == [0, 1, 2, 3]
        assert done.samples == 4
        for sample in samples:
            assert sample.output_ids.dtype == np.int32
            assert sample.logprobs.dtype == np.float32
            assert [(s.version, s.start, s.end) for s in sample.versions] == [
                (replica.version, 0, len(sample.output_ids))
            ]
            expected = forward_logprobs(replica.model, done.prompt_ids, sample, temperature)
            assert np.abs(sample.logprobs - expected).max() <= LOGPROB_TOLERANCE
            stopped = sample.output_ids[-1] == 2
            assert sample.finish_reason == (FinishReason.STOP if stopped else FinishReason.LENGTH)
            assert stopped or len(sample.output_ids) == 48
    assert len({tuple(s.output_ids) for samples, _ in results for s in samples}) == 8


async def test_every_token_carries_the_version_it_was_sampled_under(client: RolloutClient, replica: Replica) -> None:
    """Weights change again and again under running samples, by stream and by load; each span recomputes exactly under
    its own version's weights and clearly not under the other's."""
    await load(client, replica, replica.model)
    folders = {replica.version: replica.model}
    running = asyncio.create_task(drafts(client, request(12, LONG)))
    await until_running(client, 12)
    while not running.done() and len(folders) < 9:
        folder = replica.other if len(folders) % 2 else replica.model
        if len(folders) % 4 < 2:
            version = await load(client, replica, folder)
        else:
            version = (await stream_weights(client, replica.next_version(), folder)).version
        folders[version] = folder
        await client.info(timeout_s=CALL_S)
    samples, done = await running
    changed = [s for s in samples if len(s.versions) > 1]
    assert changed, "no sample saw a change of weights"
    for sample in samples:
        by_folder = {f: forward_logprobs(f, done.prompt_ids, sample, 1.0) for f in (replica.model, replica.other)}
        for span in sample.versions:
            own = folders[span.version]
            foreign = replica.other if own == replica.model else replica.model
            part = slice(span.start, span.end)
            assert np.abs(sample.logprobs[part] - by_folder[own][part]).max() <= LOGPROB_TOLERANCE
            assert np.abs(sample.logprobs[part] - by_folder[foreign][part]).max() > LOGPROB_TOLERANCE
    assert all(
        [s.version for s in sample.versions] == sorted({s.version for s in sample.versions}) for sample in changed
    )


async def test_prefixes_of_old_weights_are_not_used_again(client: RolloutClient, replica: Replica) -> None:
    prompt = request(1, Sampling(max_new_tokens=8), "a question whose KV stays in the cache " * 4)
    for folder in (replica.model, replica.other, replica.model):
        await load(client, replica, folder)
        for cached in (False, True):
            (sample,), done = await drafts(client, prompt)
            assert (sample.cached_tokens == len(done.prompt_ids) - 1) == cached
            expected = forward_logprobs(folder, done.prompt_ids, sample, 1.0)
            assert np.abs(sample.logprobs - expected).max() <= LOGPROB_TOLERANCE


async def test_refinement_is_spliced_from_the_drafts_ids_and_finds_its_kv(
    client: RolloutClient, replica: Replica
) -> None:
    await load(client, replica, replica.model)
    tokenizer = make_tokenizer()
    after = tokenizer.encode(f"\n<|im_start|>user\n{IMPROVE_REQUEST}<|im_end|>\n<|im_start|>assistant\n").ids
    samples, stage_one = await drafts(client, request(6, Sampling(max_new_tokens=60)))
    draft = next(s for s in samples if not set(s.output_ids[:-1].tolist()) & {0, 1, 2})
    truncated = draft.finish_reason == FinishReason.LENGTH
    refine = RefineRequest(
        n=3, sampling=Sampling(max_new_tokens=16), messages=question(), draft_ids=draft.output_ids,
        draft_truncated=truncated, first_index=5,
    )  # fmt: skip
    refined, stage_two = await collect(client.refine(refine, timeout_s=CALL_S))
    first = [*stage_one.prompt_ids.tolist(), *draft.output_ids.tolist()]
    assert stage_two.prompt_ids.tolist() == [*first, *([2] if draft.output_ids[-1] != 2 else []), *after]
    assert [s.index for s in refined] == [5, 6, 7]
    assert min(s.cached_tokens for s in refined) >= len(first) - 1  # the last sampled token was never fed back
    for sample in refined:
        expected = forward_logprobs(replica.model, stage_two.prompt_ids, sample, 1.0)
        assert np.abs(sample.logprobs - expected).max() <= LOGPROB_TOLERANCE


async def test_samples_stream_back_one_by_one(client: RolloutClient) -> None:
    """One request's short and long samples: the first arrives while others still run."""
    stream = client.generate(GenerateRequest(n=24, sampling=LONG, messages=question()), timeout_s=CALL_S)
    first = await anext(stream)
    assert isinstance(first, Sample)
    assert (await client.info(timeout_s=CALL_S)).running > 0
    await stream.aclose()
    await until_idle(client)


async def test_cancel_and_deadline_stop_the_work(client: RolloutClient) -> None:
    stream = client.draft(request(8, LONG), timeout_s=CALL_S)
    waiting = asyncio.create_task(anext(stream))
    await until_running(client, 8)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    await until_idle(client)
    with pytest.raises(DeadlineError):
        await collect(client.draft(request(8, LONG), timeout_s=0.15))
    await until_idle(client)


async def test_what_cannot_be_sampled_is_invalid_and_says_why(client: RolloutClient) -> None:
    context = (await client.info(timeout_s=CALL_S)).context_tokens
    prompt = np.full(context - 10, 50, np.int32)
    fits = DraftRequest(n=1, sampling=Sampling(max_new_tokens=10), prompt_ids=prompt)
    (sample,), done = await drafts(client, fits)
    assert len(sample.output_ids) == 10 or sample.finish_reason == FinishReason.STOP
    assert done.prompt_ids.tolist() == prompt.tolist()
    bad: list[tuple[DraftRequest, str]] = [
        (
            DraftRequest(n=1, sampling=Sampling(max_new_tokens=11), prompt_ids=prompt),
            f"{context - 10} tokens .* 11 .*{context}",
        ),
        (DraftRequest(n=1, sampling=LONG), "exactly one"),
        (DraftRequest(n=1, sampling=LONG, prompt_ids=prompt, messages=question()), "exactly one"),
        (DraftRequest(n=1, sampling=LONG, prompt_ids=np.array([4, 320], np.int32)), "vocabulary"),
        (DraftRequest(n=1, sampling=Sampling(max_new_tokens=4, top_k=0), messages=question()), "top_k"),
        (DraftRequest(n=5000, sampling=LONG, messages=question()), "5000"),
    ]  # fmt: skip
    for body, text in bad:
        with pytest.raises(InvalidError, match=text):
            await drafts(client, body)
    with pytest.raises(InvalidError, match="control id 1"):
        sampling, draft = Sampling(max_new_tokens=4), np.array([5, 1, 6], np.int32)
        refine = RefineRequest(n=1, sampling=sampling, messages=question(), draft_ids=draft)
        await collect(client.refine(refine, timeout_s=CALL_S))


async def test_pause_admits_nothing_and_resume_goes_on(client: RolloutClient) -> None:
    known = (await client.info(timeout_s=CALL_S)).revision
    watch = asyncio.create_task(client.info(known, 20_000, timeout_s=CALL_S))
    await client.pause(timeout_s=CALL_S)
    paused = await watch
    assert (paused.state, paused.revision > known) == ("paused", True)
    assert (await client.health(timeout_s=CALL_S)).ready is False
    with pytest.raises(UnavailableError, match="paused"):
        await drafts(client, request(1, LONG))
    await client.resume(timeout_s=CALL_S)
    assert (await client.health(timeout_s=CALL_S)).ready is True
    await drafts(client, request(1, Sampling(max_new_tokens=2)))


async def test_drain_lets_running_samples_end_under_their_own_weights(client: RolloutClient, replica: Replica) -> None:
    await load(client, replica, replica.model)
    old = replica.version
    short = Sampling(max_new_tokens=80)
    running = asyncio.create_task(drafts(client, request(32, short)))
    await until_running(client, 32)
    update = asyncio.create_task(load(client, replica, replica.other, policy=UpdatePolicy.DRAIN))
    late = asyncio.create_task(drafts(client, request(2, short)))
    new = await update
    samples, _ = await running
    assert {span.version for s in samples for span in s.versions} <= {old, new}
    assert all(len(s.versions) == 1 for s in samples)
    assert {span.version for s in (await late)[0] for span in s.versions} == {new}


async def test_a_bad_transfer_changes_nothing(client: RolloutClient, replica: Replica) -> None:
    await load(client, replica, replica.model)
    served, version = replica.version, Version(replica.version.incarnation, replica.version.step + 1)
    manifest, data = tensors_of(replica.other)
    begin = WeightsBegin(version=version, manifest=manifest, total_bytes=len(data))
    commit = WeightsCommit(version=version)
    chunk = WeightsChunk(version=version, offset=0, data=np.frombuffer(data, np.uint8).copy())
    with pytest.raises(RefusedError, match="begin it first"):
        await client.weights_chunk(chunk, timeout_s=CALL_S)
    await client.weights_begin(begin, timeout_s=CALL_S)
    with pytest.raises(InvalidError, match="incomplete from byte 0"):
        await client.weights_commit(commit, timeout_s=CALL_S)
    chunk.data[len(data) // 2] ^= 1
    await client.weights_chunk(chunk, timeout_s=CALL_S)
    with pytest.raises(InvalidError, match="checksum"):
        await client.weights_commit(commit, timeout_s=CALL_S)
    await client.weights_abort(WeightsAbort(version=version), timeout_s=CALL_S)
    with pytest.raises(RefusedError):
        await client.weights_commit(commit, timeout_s=CALL_S)
    with pytest.raises(InvalidError, match="missing"):
        await client.weights_begin(
            WeightsBegin(version=version, manifest=manifest[1:], total_bytes=0), timeout_s=CALL_S
        )
    with pytest.raises(InvalidError, match=r"no \*\.safetensors"):
        await client.weights_load(WeightsLoad(version=version, path=str(replica.folder)), timeout_s=CALL_S)
    older = Version(served.incarnation, served.step - 1)
    with pytest.raises(StaleError):
        await client.weights_load(WeightsLoad(version=older, path=str(replica.other)), timeout_s=CALL_S)
    info = await client.info(timeout_s=CALL_S)
    assert (info.version, info.state) == (served, "ready")
    (sample,), done = await drafts(client, request(1, Sampling(max_new_tokens=8)))
    expected = forward_logprobs(replica.model, done.prompt_ids, sample, 1.0)
    assert np.abs(sample.logprobs - expected).max() <= LOGPROB_TOLERANCE


async def test_a_lost_acknowledgement_does_no_harm(client: RolloutClient, replica: Replica) -> None:
    version = await load(client, replica, replica.other)
    updates = (await client.info(timeout_s=CALL_S)).weight_updates
    manifest, data = tensors_of(replica.other)
    again = WeightsLoad(version=version, path=str(replica.other), manifest=manifest)
    assert (await client.weights_load(again, timeout_s=CALL_S)).version == version
    begin = WeightsBegin(version=version, manifest=manifest, total_bytes=len(data))
    assert await client.weights_begin(begin, timeout_s=CALL_S) == Ack()
    assert (await client.weights_commit(WeightsCommit(version=version), timeout_s=CALL_S)).version == version
    assert (await client.info(timeout_s=CALL_S)).weight_updates == updates
    both = WeightsLoad(version=replica.next_version(), path=str(replica.model), manifest=tensors_of(replica.model)[0])
    done = await asyncio.gather(*(client.weights_load(both, timeout_s=CALL_S) for _ in range(3)))
    assert {d.version for d in done} == {replica.version}
    assert (await client.info(timeout_s=CALL_S)).weight_updates == updates + 1


async def test_an_orchestrator_that_comes_late_is_greeted(client: RolloutClient, replica: Replica) -> None:
    greeted: asyncio.Future[ReplicaHello] = asyncio.get_running_loop().create_future()

    async def hello(_: Any, body: ReplicaHello) -> ReplicaWelcome:
        if not greeted.done():
            greeted.set_result(body)
        return ReplicaWelcome(accepted=True, heartbeat_s=1.0)

    orchestrator = Server("orchestrator", f"ipc://{replica.folder}/orchestrator.sock")
    orchestrator.route("hello", ReplicaHello, hello)
    await orchestrator.start()
    try:
        body = await asyncio.wait_for(greeted, 30.0)
    finally:
        await orchestrator.close()
    info = await client.info(timeout_s=CALL_S)
    assert (body.name, body.address, body.capacity) == ("r0", replica.server.address, info.capacity)
    assert body.context_tokens == info.context_tokens


async def test_a_dead_scheduler_costs_its_requests_and_nothing_else(client: RolloutClient, replica: Replica) -> None:
    await load(client, replica, replica.other)
    before = replica.server.tree()
    (scheduler,) = [p for p in before if "scheduler" in p.name()]
    running = asyncio.create_task(drafts(client, request(16, LONG)))
    await until_running(client, 16)
    known = (await client.info(timeout_s=CALL_S)).revision
    scheduler.kill()
    with pytest.raises(UnavailableError):
        await running
    info = await client.info(known, 30_000, timeout_s=CALL_S)
    assert (info.version, info.state, info.running) == (Version(0, 0), "starting", 0)
    with pytest.raises(UnavailableError):
        await drafts(client, request(1, LONG))
    while info.state == "starting":
        assert (await client.health(timeout_s=CALL_S)).ready is False
        info = await client.info(info.revision, 60_000, timeout_s=90.0)
    assert (info.version, info.state) == (Version(0, 0), "ready")
    replica.version = info.version
    assert not [p for p in before if p.is_running()]
    (sample,), done = await drafts(client, request(1, Sampling(max_new_tokens=8)))
    expected = forward_logprobs(replica.model, done.prompt_ids, sample, 1.0)
    assert np.abs(sample.logprobs - expected).max() <= LOGPROB_TOLERANCE
    assert await load(client, replica, replica.other) == Version(1, 1)


async def test_killing_the_server_leaves_no_process(client: RolloutClient, replica: Replica) -> None:
    family = replica.server.tree()
    assert len(family) >= 2
    replica.server.process.kill()
    _, left = await asyncio.to_thread(psutil.wait_procs, family, 15.0)
    assert not left
