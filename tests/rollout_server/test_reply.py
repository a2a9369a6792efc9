"""A reply of the engine that cannot be trained on never leaves the server."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from protocol.errors import InternalError
from protocol.messages import FinishReason, VersionSpan
from rollout_server.engine import sample_of


def reply(logprobs: list[float], versions: list[list[Any]], tokens: int = 3) -> dict[str, Any]:
    return {
        "output_ids": np.arange(tokens, dtype=np.int32).tobytes(),
        "logprobs": np.array(logprobs, np.float32).tobytes(),
        "versions": versions,
        "finish": "stop",
        "cached_tokens": 7,
    }


def test_spans_become_versions() -> None:
    sample = sample_of(reply([-1, -2, -3], [["0:0", 0, 0], ["1:4", 0, 2], ["1:5", 2, 3]]))
    assert sample.versions == [VersionSpan(1, 4, 0, 2), VersionSpan(1, 5, 2, 3)]
    assert (sample.finish_reason, sample.cached_tokens, sample.output_ids.tolist()) == (FinishReason.STOP, 7, [0, 1, 2])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_logprobs_that_are_not_finite_are_an_internal_error(bad: float) -> None:
    with pytest.raises(InternalError, match="not finite"):
        sample_of(reply([-1, bad, -3], [["0:0", 0, 3]]))


@pytest.mark.parametrize(
    "versions", [[], [["0:0", 0, 2]], [["0:0", 1, 3]], [["0:0", 0, 1], ["0:1", 2, 3]], [["0:0", 0, 4]]]
)
def test_spans_must_cover_every_token(versions: list[list[Any]]) -> None:
    with pytest.raises(InternalError, match="do not cover"):
        sample_of(reply([-1, -2, -3], versions))


def test_one_logprob_per_token() -> None:
    with pytest.raises(InternalError):
        sample_of(reply([-1, -2], [["0:0", 0, 3]]))
