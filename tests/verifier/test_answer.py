"""Reading completions: the last box, joined boxes, formats, and that all of it is linear in the text."""

from __future__ import annotations

import time

import pytest

from verifier.answer import boxed_end, extract, think_answer


@pytest.mark.parametrize(
    ("text", "answer", "problem"),
    [
        (r"so \boxed{5}", "5", ""),
        (r"\boxed{5} no, \boxed{ \frac{1}{2} }.", r"\frac{1}{2}", ""),
        (r"\boxed{5} and then \boxed{7", None, "unterminated_box"),
        (r"\boxed{5} and then \boxed", None, "unterminated_box"),
        (r"\boxed 5", None, "unterminated_box"),
        (r"\boxed{\boxed{5}}", "5", ""),
        (r"\boxed {5}", "5", ""),
        (r"\boxed{}", None, "empty_box"),
        (r"\boxed{  }", None, "empty_box"),
        ("the answer is 5", None, "no_box"),
        ("", None, "no_box"),
        (r"$\boxed{1}$, $\boxed{2}$ and $\boxed{3}$", "1,2,3", ""),
        (r"\boxed{1} or \boxed{2}", "1,2", ""),
        (r"\boxed{5}, \boxed{5}", "5", ""),
        (r"\boxed{4}\boxed{5}", "5", ""),
        (r"\boxed{4} is what I thought, and \boxed{5}", "5", ""),
        (r"\boxed{\text{a}b}c", r"\text{a}b", ""),
        ("\\boxed{\u0663}", "\u0663", ""),
        ("\\boxed{\x00}", "\x00", ""),
    ],
)
def test_extract(text: str, answer: str | None, problem: str) -> None:
    found = extract(text)
    assert (found.answer, found.problem) == (answer, problem)


@pytest.mark.parametrize(
    ("text", "well_formed"),
    [
        (r"3+4=\boxed{7}", True),
        ("3+4=$\\boxed{7}$.\n", True),
        (r"\[\boxed{7}\]", True),
        (r"\boxed{7} is it", False),
        (r"\boxed{6}\boxed{7}", False),
        (r"\boxed{7", False),
        (r"\boxed{}", False),
        ("7", False),
    ],
)
def test_boxed_end(text: str, well_formed: bool) -> None:
    assert boxed_end(text) is well_formed


@pytest.mark.parametrize(
    ("text", "well_formed"),
    [
        ("<think>a</think><answer>\\boxed{7}</answer>", True),
        ("<think>\na\n</think>\n<answer>\n7\n</answer>\n", True),
        ("<think>a</think> so <answer>7</answer>", False),
        ("<think>a</think><answer>7</answer> more", False),
        ("before <think>a</think><answer>7</answer>", False),
        ("<think>a<think>b</think><answer>7</answer>", False),
        ("<think></think><answer>7</answer>", False),
        ("<think>a</think><answer> </answer>", False),
        ("<think>a</think><answer>7", False),
    ],
)
def test_think_answer(text: str, well_formed: bool) -> None:
    assert think_answer(text) is well_formed


@pytest.mark.parametrize(
    "text",
    [
        "\\boxed{" * 150_000,
        "\\boxed" * 170_000,
        "{" * 1_000_000,
        "\\boxed{1} " * 100_000 + "}" * 10,
        "\\boxed{1}," * 100_000,
        "<think>" * 140_000,
        "<think>x</think>" * 60_000 + "<answer>",
        "\\boxed{x}" + " " * 1_000_000 + "x",
        "\\boxed{x}" + " " * 500_000 + "\\boxed{x}",
        "\\boxed{" + "{" * 500_000 + "}" * 500_000,
    ],
    ids=lambda text: text[:12],
)
def test_a_megabyte_is_read_in_linear_time(text: str) -> None:
    start = time.process_time()
    extract(text)
    boxed_end(text)
    think_answer(text)
    assert time.process_time() - start < 1.0  # about 0.1 s; quadratic would take minutes
