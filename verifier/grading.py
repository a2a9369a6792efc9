"""From a completion to a verdict, in the service's own process: what a glance decides, and what needs a worker.

INVARIANT: completions are only searched here, in time linear in their length; nothing of them is parsed or evaluated.
What takes more than that becomes a Task for a worker process.
"""

from __future__ import annotations

from dataclasses import dataclass

from protocol.messages import Verdict, VerdictStatus, VerifyItem
from verifier import answer as answers
from verifier import numeric
from verifier.cache import VerdictCache
from verifier.config import VerifierConfig
from verifier.frames import Outcome, Task

CACHEABLE = frozenset({"correct", "wrong", "unparsable"})
"""Outcomes that depend on (reference, answer) alone, and `error` with a bad reference. Timeouts and crashes do not."""

BAD_REFERENCE = "bad_reference"


@dataclass(frozen=True, slots=True)
class Glance:
    """What the parent process knows of an item. Exactly one of `verdict` and `task` is set."""

    item: VerifyItem
    parts: dict[str, float]
    source: str  # rule | numeric | cache | worker
    extracted: str = ""
    verdict: Verdict | None = None
    task: Task | None = None


class MathGrading:
    """The `math` task: last box, plain numbers, remembered outcomes; the rest goes to math-verify in a worker."""

    def __init__(self, config: VerifierConfig) -> None:
        self._config = config
        self._cache: VerdictCache[Outcome] = VerdictCache(config.cache_entries)

    def glance(self, item: VerifyItem) -> Glance:
        """Decide the item if that takes no parsing; otherwise say what a worker has to grade."""
        config = self._config
        text, reference = item.completion, item.reference.strip()
        if len(text) > config.max_completion_chars:
            parts = {} if config.format == "none" else {"format": 0.0}
            detail = f"completion of more than {config.max_completion_chars} characters"
            return self._decided(item, parts, "rule", "", VerdictStatus.UNPARSABLE, detail)
        parts = self._parts(text)
        if not reference or len(reference) > config.max_reference_chars:
            detail = f"{BAD_REFERENCE}: {'too long' if reference else 'empty'}"
            return self._decided(item, parts, "rule", "", VerdictStatus.ERROR, detail)
        found = answers.extract(text)
        if found.answer is None:
            status = VerdictStatus.NO_ANSWER if found.problem == "no_box" else VerdictStatus.UNPARSABLE
            return self._decided(item, parts, "rule", "", status, found.problem)
        if len(found.answer) > config.max_answer_chars:
            detail = f"answer of more than {config.max_answer_chars} characters"
            cut = found.answer[: config.max_answer_chars]
            return self._decided(item, parts, "rule", cut, VerdictStatus.UNPARSABLE, detail)
        return self._compare(item, parts, reference, found.answer)

    def _compare(self, item: VerifyItem, parts: dict[str, float], reference: str, answer: str) -> Glance:
        gold = numeric.plain(reference)
        if gold is not None:
            if self._config.require_evaluated and numeric.unevaluated(gold, answer):
                return self._decided(item, parts, "rule", answer, VerdictStatus.WRONG, "not one evaluated number")
            given = numeric.plain(answer)
            equal = numeric.compare(gold, given) if given is not None else None
            if equal is not None:
                status = VerdictStatus.CORRECT if equal else VerdictStatus.WRONG
                return self._decided(item, parts, "numeric", answer, status, "plain numbers")
        known = self._cache.get(reference, answer)
        if known is not None:
            status = VerdictStatus(known.status)
            return self._decided(item, parts, "cache", answer, status, known.detail)
        return Glance(item, parts, "worker", answer, task=Task(item.task or self._config.task, reference, answer))

    def conclude(self, glance: Glance, outcome: Outcome) -> Verdict:
        """The verdict that a worker's outcome makes of the item; remembers what will be so again."""
        if glance.task is not None and (
            outcome.status in CACHEABLE or (outcome.status == "error" and outcome.detail.startswith(BAD_REFERENCE))
        ):
            self._cache.put(glance.task.reference, glance.task.answer, outcome)
        status = VerdictStatus(outcome.status)
        return _verdict(glance.item, glance.parts, glance.extracted, status, outcome.detail, outcome.seconds)

    def _parts(self, text: str) -> dict[str, float]:
        match self._config.format:
            case "boxed_end":
                return {"format": float(answers.boxed_end(text))}
            case "think_answer":
                return {"format": float(answers.think_answer(text))}
            case "none":
                return {}

    @staticmethod
    def _decided(
        item: VerifyItem, parts: dict[str, float], source: str, extracted: str, status: VerdictStatus, detail: str
    ) -> Glance:
        return Glance(item, parts, source, extracted, verdict=_verdict(item, parts, extracted, status, detail, 0.0))


def _verdict(
    item: VerifyItem, parts: dict[str, float], extracted: str, status: VerdictStatus, detail: str, seconds: float
) -> Verdict:
    score = 1.0 if status is VerdictStatus.CORRECT else 0.0
    return Verdict(
        id=item.id, status=status, score=score, extracted=extracted, detail=detail, seconds=seconds, parts=parts
    )
