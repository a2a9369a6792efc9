r"""Plain numbers: the path that needs no sympy, and the rule against arithmetic left in the box. Pure, linear time.

INVARIANT: where `compare` decides, it decides as math-verify does on `\boxed{reference}` and `\boxed{answer}`
(tests/verifier/test_numeric.py holds it against math-verify); where it cannot be sure, it returns None.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

MAX_DIGITS = 15
"""Longer decimals lose digits in math-verify's floats; such numbers are left to it."""

MAX_DECIMALS = 6
"""math-verify rounds to six decimals where one side is a decimal."""

_ROUNDING = Fraction(1, 10**5)
"""Nearer than this, a comparison with a decimal depends on how math-verify rounds."""

_INTEGER = re.compile(r"[+-]?\d{1,64}")
_GROUPED = re.compile(r"-?[1-9]\d{0,2}(?:,\d{3}){1,8}")
_DECIMAL = re.compile(r"[+-]?\d{0,15}\.\d{1,6}")
_SLASH = re.compile(r"([+-]?\d{1,32})/(\d{1,32})")
_FRAC = re.compile(r"([+-]?)\\[dt]?frac\{([+-]?\d{1,32})\}\{(\d{1,32})\}")


@dataclass(frozen=True, slots=True)
class Plain:
    """A plain number. decimal: written with a decimal point, so that math-verify compares it after rounding."""

    value: Fraction
    decimal: bool = False

    @property
    def integer(self) -> bool:
        return self.value.denominator == 1


def plain(text: str) -> Plain | None:
    """The number that the text is, or None if it is not a plain integer, decimal or simple fraction."""
    text = text.strip()
    if len(text) > 128 or not text.isascii():
        return None
    if _INTEGER.fullmatch(text):
        return Plain(Fraction(int(text)))
    if _GROUPED.fullmatch(text):
        return Plain(Fraction(int(text.replace(",", ""))))
    if _DECIMAL.fullmatch(text):
        if len(text.lstrip("+-0.").replace(".", "")) > MAX_DIGITS:
            return None
        return Plain(Fraction(text), decimal=True)
    if match := _SLASH.fullmatch(text):
        return _fraction("", match[1], match[2])
    if match := _FRAC.fullmatch(text):
        return _fraction(match[1], match[2], match[3])
    return None


def _fraction(sign: str, numerator: str, denominator: str) -> Plain | None:
    if int(denominator) == 0:
        return None
    value = Fraction(int(numerator), int(denominator))
    return Plain(-value if sign == "-" else value)


def compare(reference: Plain, answer: Plain) -> bool | None:
    """Whether math-verify holds the two equal; None where that hangs on its rounding."""
    if reference.value == answer.value:
        return True
    if (reference.decimal or answer.decimal) and abs(reference.value - answer.value) < _ROUNDING:
        both_short_decimals = reference.decimal and answer.decimal
        return False if both_short_decimals else None
    return False


_WORDS = re.compile(r"\\(?:text|textbf|textrm|mathrm|mathbf|mbox|operatorname)\s?\{[^{}\d]*\}(?:\^\{?[23]\}?)?")
_UNIT_POWER = re.compile(r"(?<=[A-Za-z])\^\{?[23]\}?|\^\{?\\circ\}?")
_GROUPING = re.compile(r"(?<=\d)(?:,|\{,\}|\\,|\\!|\\ )+(?=\d{3})")
_SCIENTIFIC = re.compile(r"[+-]?[\d.,]+\s?(?:\\times|\\cdot|×|\*)\s?10\s?\^\s?\{?[+-]?\d{1,3}\}?")
_MIXED = re.compile(r"[+-]?(?:\d+\s?)?(?:\\[dtc]?frac\s?(?:\{\s?[+-]?\d+\s?\}\s?\{\s?\d+\s?\}|\d\d)|\d+\s?/\s?\d+)")
_NUMERAL = re.compile(r"\d+(?:\.\d+)?|\.\d+")
_OPERATOR = re.compile(
    r"[+*!^|×·÷√]|\d\s?-|\\(?:times|cdot|div|ast|sum|prod|int|d?binom|choose|sqrt|log|ln|exp|lim|gcd|lcm|max|min|sin|cos|tan|"
    r"det|lfloor|lceil|bmod|pmod|mod|over)(?![A-Za-z])"
)


def unevaluated(reference: Plain, answer: str) -> bool:
    """Whether the answer to a plain-number question is a calculation (`3+9`, `2^{10}`, `6/2`) and not its result.

    What remains to calculate could be the question itself, restated in the box. Units, degrees, scientific notation,
    an equation's left side (`x = 12`) and, unless the reference is an integer, one fraction or mixed number are no
    calculations.
    """
    text = next((side for side in reversed(answer.split("=")) if side.strip()), "")
    text = _UNIT_POWER.sub("", _WORDS.sub(" ", text))
    text = _GROUPING.sub("", text).strip().strip("$").strip()
    if _SCIENTIFIC.fullmatch(text):
        return False
    if _MIXED.fullmatch(text):
        return reference.integer
    return len(_NUMERAL.findall(text)) > 1 or _OPERATOR.search(text.removeprefix("+")) is not None
