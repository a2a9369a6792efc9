"""The path for plain numbers decides as math-verify does; and what counts as an evaluated number."""

from __future__ import annotations

import random
import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verifier import math
from verifier.numeric import compare, plain, unevaluated

SIGN = st.sampled_from(["", "", "-", "+"])
DENOMINATOR = st.sampled_from([1, 2, 3, 4, 5, 7, 8, 16, 40, 1000])


def digits(low: int, high: int) -> st.SearchStrategy[str]:
    return st.text("0123456789", min_size=low, max_size=high)


INTEGER = st.builds("{}{}".format, SIGN, digits(1, 12))
GROUPED = st.builds(lambda sign, n: f"{sign}{n:,}", st.sampled_from(["", "-"]), st.integers(1000, 10**12))
DECIMAL = st.builds("{}{}.{}".format, SIGN, digits(0, 8), digits(1, 6))
SLASH = st.builds("{}{}/{}".format, SIGN, st.integers(0, 99), DENOMINATOR)
FRAC = st.builds(
    lambda sign, name, inner, n, d: f"{sign}\\{name}{{{inner}{n}}}{{{d}}}",
    SIGN,
    st.sampled_from(["frac", "dfrac", "tfrac"]),
    st.sampled_from(["", "-"]),
    st.integers(0, 99),
    DENOMINATOR,
)
NUMBER = st.one_of(INTEGER, GROUPED, DECIMAL, SLASH, FRAC)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[str, str]:
    """A number and another, which is often the same value written otherwise, or one a hair away."""
    first = draw(NUMBER)
    known = plain(first)
    if known is None or draw(st.integers(0, 2)) == 0:
        return first, draw(NUMBER)
    value = known.value + draw(
        st.sampled_from([Fraction(0)] * 3 + [Fraction(1, 10**6), Fraction(-1, 10**5), Fraction(1)])
    )
    ways = [f"{float(value):.{places}f}" for places in (0, 1, 3, 6)]
    ways += [f"{value.numerator}/{value.denominator}", f"\\frac{{{value.numerator}}}{{{value.denominator}}}"]
    return first, draw(st.sampled_from(ways))


@settings(max_examples=600, deadline=None)
@given(pairs())
def test_decides_as_math_verify(pair: tuple[str, str]) -> None:
    reference, answer = plain(pair[0]), plain(pair[1])
    decided = compare(reference, answer) if reference and answer else None
    if decided is not None:
        assert math.grade(*pair).status == ("correct" if decided else "wrong")


@pytest.mark.parametrize(
    "text", ["1/0", "1 234", "1e3", "5.", "--5", "x", "", " ", "50\\%", "1,23", "0,123", "\u0665", "1_000"]
)
def test_is_not_plain(text: str) -> None:
    assert plain(text) is None


def test_leaves_rounding_to_math_verify() -> None:
    third, rounded = plain("1/3"), plain("0.333333")
    assert third and rounded and compare(third, rounded) is None


CALCULATIONS = (
    r"""
3+9 | 2^{10} | 2*6 | 3\times 4 | 3\cdot4 | 24/2 | \frac{24}{2} | 13-1 | \sqrt{144} | 4! | (3)(4) | 3 4 | -(-12)-0
x=3+9 | 12=3+9 | 3+9= | \binom{12}{1} | 9^{9^{9}} | \sum_{k=1}^{10^9} k | \text{3+9} | 3\text{+}9
""".replace("\n", " | ")
    .strip(" |")
    .split(" | ")
)


@pytest.mark.parametrize("answer", CALCULATIONS)
def test_a_calculation_is_not_an_answer(answer: str) -> None:
    reference = plain("12")
    assert reference and unevaluated(reference, answer)


@pytest.mark.parametrize(
    ("reference", "answer"),
    [
        ("12", "12"),
        ("12", "-12"),
        ("12", "+12"),
        ("12", "x = 12"),
        ("12", "3+9=12"),
        ("12", r"12\text{ apples}"),
        ("12", r"12\,\text{cm}^2"),
        ("12", "12 cm^2"),
        ("90", r"90^\circ"),
        ("90", r"90^{\circ}"),
        ("1234", "1,234"),
        ("1234", r"\$1{,}234.00"),
        ("120000", r"1.2 \times 10^5"),
        ("7/2", r"3\frac{1}{2}"),
        ("7/2", "7/2"),
        ("0.5", r"\frac{1}{2}"),
        ("50", r"50\%"),
        ("12", r"\mathbf{12}"),
        ("12", "$12$"),
    ],
)
def test_one_number_is_an_answer(reference: str, answer: str) -> None:
    known = plain(reference)
    assert known and not unevaluated(known, answer)


def test_is_fast_and_linear_on_any_text() -> None:
    rng = random.Random(0)
    reference = plain("12")
    assert reference
    texts = ["".join(rng.choices("0123456789+-.,/^{} \\frac=text", k=1000)) for _ in range(100)]
    texts += ["1" * 1000, "1," * 500, "1 " * 500, "\\text{" * 160, "\\," * 500, " " * 1000, "1.1." * 250, "=" * 1000]
    start = time.process_time()
    for text in texts:
        plain(text)
        unevaluated(reference, text)
    assert time.process_time() - start < 0.5  # about 10 ms
