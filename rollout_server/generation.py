"""draft, refine, generate: one request is N samples, each its own engine request, streamed back as it finishes."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry, Counter

from protocol.errors import InvalidError, UnavailableError
from protocol.messages import DraftRequest, GenerationDone, RefineRequest, Sample, Sampling
from protocol.server import Call
from rollout_server.admission import Admission, SampleClass
from rollout_server.supervisor import Supervisor
from rollout_server.templates import Prompter, Spliced
from rollout_server.tokenizer import Tokenizer

MAX_SAMPLES = 1024
"""Samples of one request."""


class Generation:
    """Shared by the three endpoints. Cancelling a handler (cancel, deadline, engine death) aborts its samples."""

    def __init__(
        self,
        supervisor: Supervisor,
        admission: Admission,
        tokenizer: Tokenizer,
        prompter: Prompter,
        context_tokens: int,
        registry: CollectorRegistry,
    ) -> None:
        self._supervisor = supervisor
        self._admission = admission
        self._tokenizer = tokenizer
        self._prompter = prompter
        self._context = context_tokens
        self.generated_tokens = 0
        self._samples = Counter("rollout_samples", "Finished samples.", ["kind"], registry=registry)
        self._tokens = Counter("rollout_tokens", "Sampled tokens.", ["kind"], registry=registry)
        self._cached = Counter("rollout_cached_tokens", "Prompt tokens found cached.", ["kind"], registry=registry)

    async def draft(self, call: Call, request: DraftRequest) -> GenerationDone:
        return await self._run(call, request, Spliced(self._prompt(request), 0), SampleClass.DRAFT)

    async def generate(self, call: Call, request: DraftRequest) -> GenerationDone:
        return await self._run(call, request, Spliced(self._prompt(request), 0), SampleClass.GENERATE)

    async def refine(self, call: Call, request: RefineRequest) -> GenerationDone:
        _exactly_one(request)
        spliced = self._prompter.refine(
            request.messages, request.prompt_ids, request.draft_ids, request.sampling.max_new_tokens
        )
        return await self._run(call, request, spliced, SampleClass.REFINE)

    def _prompt(self, request: DraftRequest) -> np.ndarray:
        _exactly_one(request)
        if request.messages is not None:
            return self._prompter.prompt(request.messages)
        assert request.prompt_ids is not None
        return self._prompter.checked(request.prompt_ids)

    async def _run(self, call: Call, request: DraftRequest, prompt: Spliced, order: SampleClass) -> GenerationDone:
        self._supervisor.engine()
        if self._supervisor.state == "paused":
            raise UnavailableError("paused")
        self._check(request, len(prompt.ids))
        sampling = self._engine_sampling(request.sampling)
        pending = {
            asyncio.create_task(self._sample(request.first_index + i, prompt.ids, sampling, order))
            for i in range(request.n)
        }
        try:
            while pending:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for task in sorted(done, key=lambda t: t.exception() is not None):  # results before failures
                    await call.reply(self._counted(task.result(), call.kind))
        finally:
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)
        return GenerationDone(prompt_ids=prompt.ids, samples=request.n, draft_dropped_tokens=prompt.dropped)

    def _check(self, request: DraftRequest, prompt_tokens: int) -> None:
        if request.n > MAX_SAMPLES:
            raise InvalidError(f"n {request.n} exceeds {MAX_SAMPLES} samples a request")
        new = request.sampling.max_new_tokens
        if prompt_tokens + new > self._context:
            raise InvalidError(
                f"prompt of {prompt_tokens} tokens and max_new_tokens {new} exceed the context of {self._context}"
            )
        if request.sampling.top_k != -1 and request.sampling.top_k < 1:
            raise InvalidError(f"top_k {request.sampling.top_k} is neither -1 (off) nor positive")
        self._admission.check_room(request.n)

    def _engine_sampling(self, sampling: Sampling) -> dict[str, Any]:
        return {
            "max_new_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "stop_token_ids": sorted(self._prompter.stop_ids),
        }

    async def _sample(self, index: int, prompt: np.ndarray, sampling: dict[str, Any], order: SampleClass) -> Sample:
        async with self._admission.place(order):
            result = await self._supervisor.engine().sample(prompt, sampling)
        return Sample(
            index=index,
            output_ids=result.output_ids,
            logprobs=result.logprobs,
            versions=result.versions,
            finish_reason=result.finish_reason,
            text=self._tokenizer.decode(result.output_ids.tolist()),
            cached_tokens=result.cached_tokens,
        )

    def _counted(self, sample: Sample, kind: str) -> Sample:
        self.generated_tokens += len(sample.output_ids)
        self._samples.labels(kind).inc()
        self._tokens.labels(kind).inc(len(sample.output_ids))
        self._cached.labels(kind).inc(sample.cached_tokens)
        return sample


def _exactly_one(request: DraftRequest) -> None:
    if (request.messages is None) == (request.prompt_ids is None):
        raise InvalidError("exactly one of messages and prompt_ids must be given")
