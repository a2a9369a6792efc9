r"""The math grader, run in worker processes only: math-verify with the reward configuration of STACK §5.

A grade is a pure function of (reference, answer), both taken as the content of a `\boxed{}`. Imports sympy (0.8 s).
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any

from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify
from sympy import Basic, MatrixBase

from verifier.frames import Outcome

REFERENCE_CONFIG = (LatexExtractionConfig(),)
ANSWER_CONFIG = (
    LatexExtractionConfig(
        boxed_match_priority=0,
        try_extract_without_anchor=False,
        normalization_config=NormalizationConfig(
            basic_latex=True, units=True, malformed_operators=False, nits=False, boxed="all", equations=False
        ),
    ),
)

MEMORY_DETAIL = "memory limit"


def quiet() -> None:
    """math-verify warns that its alarms are off; the worker has its own (see worker.py)."""
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    logging.getLogger("latex2sympy2_extended").setLevel(logging.ERROR)


def warm_up() -> None:
    """Build math-verify's regular expressions and parser tables, so that a first task is no slower than others."""
    for answer in ("\\frac{1}{2}", "x+1", "(1,2)"):
        grade("\\sqrt{2}", answer)
    parse_reference.cache_clear()


def _parse(text: str, config: tuple[LatexExtractionConfig, ...]) -> list[Any]:
    return parse(
        f"\\boxed{{{text}}}",
        extraction_config=config,
        extraction_mode="first_match",
        parsing_timeout=None,  # pyright: ignore[reportArgumentType]  (None is documented: no alarm of its own)
        raise_on_error=True,
    )


def _has_expression(parsed: list[Any]) -> bool:
    return any(isinstance(entry, Basic | MatrixBase) for entry in parsed)


@lru_cache(maxsize=1024)
def parse_reference(reference: str) -> tuple[Any, ...]:
    """What math-verify makes of the reference; empty if it finds no expression in it."""
    try:
        parsed = _parse(reference, REFERENCE_CONFIG)
    except MemoryError:
        raise
    except Exception:
        return ()
    return tuple(parsed) if _has_expression(parsed) else ()


def grade(reference: str, answer: str) -> Outcome:
    """Grade one answer. Never raises an Exception; the worker's soft limit passes through as a BaseException."""
    try:
        gold = list(parse_reference(reference))
        if not gold:
            return Outcome("error", "bad_reference: math-verify cannot parse it")
        return _grade(gold, answer)
    except MemoryError:
        return Outcome("timeout", MEMORY_DETAIL, retire=True)


def _grade(gold: list[Any], answer: str) -> Outcome:
    try:
        predicted = _parse(answer, ANSWER_CONFIG)
    except MemoryError:
        raise
    except Exception as error:
        return Outcome("unparsable", f"math-verify: {type(error).__name__}")
    try:
        equal = verify(gold, predicted, timeout_seconds=None, raise_on_error=True)
    except MemoryError:
        raise
    except Exception as error:
        # Bare math-verify grades such a pair as unequal: both were parsed and cannot be compared.
        return Outcome("wrong", f"not comparable: {type(error).__name__}")
    if equal:
        return Outcome("correct", "math-verify")
    if not _has_expression(predicted):
        return Outcome("unparsable", "math-verify finds no expression")
    return Outcome("wrong", "math-verify")
