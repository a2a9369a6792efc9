"""The math grader itself, in this process: each status, and the order of arguments."""

from __future__ import annotations

import pytest

from verifier import math


@pytest.mark.parametrize(
    ("reference", "answer", "status"),
    [
        (r"\frac{1}{2}", "0.5", "correct"),
        (r"x^2+2x+1", r"(x+1)^2", "correct"),
        (r"\{1,2\}", r"\{2,1\}", "correct"),
        ("1,2", "1,2", "correct"),
        (r"\text{Monday}", "Monday", "correct"),
        ("1<x<2", "(1,2)", "correct"),  # verify(gold, prediction): …
        ("(1,2)", "1<x<2", "wrong"),  # … not the other way round
        (r"\sqrt{2}", r"\sqrt{3}", "wrong"),
        ("5", "1/0", "wrong"),
        ("3", r"\frac{", "unparsable"),
        ("3", "abc)", "unparsable"),
        ("{", "3", "error"),
        ("1/0", "1/0", "wrong"),
    ],
)
def test_statuses(reference: str, answer: str, status: str) -> None:
    outcome = math.grade(reference, answer)
    assert outcome.status == status
    assert outcome.detail.startswith("bad_reference") == (status == "error")
