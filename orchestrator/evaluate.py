"""Single-shot evaluation through the rollout servers: pass@1 = avg@k, pass@k, and paired differences."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from orchestrator.config import EvaluationConfig
from orchestrator.data import Problem
from orchestrator.dispatch import GENERATE, Dispatcher, Ticket
from orchestrator.grading import Grader
from orchestrator.prompt import sampling_of
from protocol.errors import InvalidError, ProtocolError
from protocol.messages import GenerateRequest, Sample, Verdict, VerdictStatus, Version


@dataclass
class Evaluation:
    """Scores of one evaluation. scores[i][j]: sample j of prompt i; None where there is no verdict (never a 0)."""

    scores: list[list[float | None]] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)
    versions: set[Version] = field(default_factory=set)
    tokens: int = 0

    @property
    def prompt_means(self) -> list[float | None]:
        """avg@k of each prompt; None for prompts without a verdict."""
        return [mean([score for score in row if score is not None]) for row in self.scores]

    @property
    def accuracy(self) -> float:
        """Mean over prompts of avg@k, which estimates pass@1; nan without verdicts."""
        result = mean([value for value in self.prompt_means if value is not None])
        return math.nan if result is None else result

    def pass_at(self, k: int) -> float:
        """Unbiased pass@k: 1 - C(n-c, k) / C(n, k) (Chen et al. 2021), over prompts with k verdicts; nan if none."""
        values = []
        for row in self.scores:
            graded = [score for score in row if score is not None]
            correct = sum(score >= 1.0 for score in graded)
            if len(graded) >= k:
                values.append(1.0 - math.comb(len(graded) - correct, k) / math.comb(len(graded), k))
        result = mean(values)
        return math.nan if result is None else result


def mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def paired_gain(before: Evaluation, after: Evaluation) -> tuple[float, float]:
    """Mean and standard error of the per-prompt difference in avg@k, over prompts with verdicts in both; else nan."""
    pairs = zip(before.prompt_means, after.prompt_means, strict=True)
    differences = [b - a for a, b in pairs if a is not None and b is not None]
    if len(differences) < 2:
        return math.nan, math.nan
    centre = sum(differences) / len(differences)
    variance = sum((d - centre) ** 2 for d in differences) / (len(differences) - 1)
    return centre, math.sqrt(variance / len(differences))


async def evaluate(
    problems: Sequence[Problem],
    config: EvaluationConfig,
    dispatcher: Dispatcher,
    grader: Grader,
    *,
    fresh: Callable[[int], bool],
    timeout_s: float,
) -> Evaluation:
    """Sample and grade `config.samples` completions of each problem. `fresh(step)`: which weights may serve it.

    Runs outside the training window with at most `config.max_in_flight` prompts at once, behind training work.
    """
    result = Evaluation(scores=[[None] * config.samples for _ in problems])
    room = asyncio.Semaphore(config.max_in_flight)

    async def one(row: int, problem: Problem) -> None:
        samples: dict[int, Sample] = {}

        def on_sample(index: int, sample: Sample) -> None:
            samples[index] = sample
            result.tokens += len(sample.output_ids)
            result.versions.update(span.version for span in sample.versions)

        def request(first: int, n: int) -> GenerateRequest:
            sampling = sampling_of(config.sampling)
            return GenerateRequest(n=n, sampling=sampling, messages=list(problem.messages), first_index=first)

        ticket = Ticket(GENERATE, row, config.samples, fresh)
        async with room:
            try:
                await dispatcher.generate(
                    ticket, request, timeout_s=timeout_s, on_start=lambda replica: None, on_sample=on_sample
                )
            except InvalidError:  # this question cannot be asked (too long); it says nothing about the others
                result.statuses[VerdictStatus.ERROR.value] += config.samples
                return
            for index, sample in samples.items():
                verdict = await grader.grade(sample.text, problem.answer)
                result.statuses[verdict.status.value] += 1
                result.scores[row][index] = _score(verdict)

    try:
        async with asyncio.TaskGroup() as tasks:
            for row, problem in enumerate(problems):
                tasks.create_task(one(row, problem))
    except* ProtocolError as errors:
        raise errors.exceptions[0] from None
    return result


def _score(verdict: Verdict) -> float | None:
    if verdict.status is VerdictStatus.ERROR:
        return None
    return 0.0 if verdict.status is VerdictStatus.TIMEOUT else verdict.score
