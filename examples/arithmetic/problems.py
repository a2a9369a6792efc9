"""Generated multi-step arithmetic: problems, their canonical form, three disjoint sets, and worked solutions.

A problem is a sum of signed terms, each a number or a product of two numbers, such as ``17+25-8*2``. Problems that
differ only in the order of terms or of factors have one canonical form, and its hash alone decides the set a problem
belongs to. No problem, nor a reordering of it, is therefore ever in two sets, whatever the seeds.

    python problems.py --out DIR [--seed 0]     writes DIR/train.jsonl and DIR/heldout.jsonl
"""

import argparse
import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Set = Literal["warm_start", "train", "heldout"]

SHARE: dict[Set, int] = {"warm_start": 60, "train": 25, "heldout": 15}
"""Percent of all canonical forms that fall to each set."""

TERM_COUNT_WEIGHTS: dict[int, int] = {2: 2, 3: 4, 4: 4}
"""How often a problem has that many terms: the mix of difficulty."""

PRODUCT_SHARE = 0.2
"""Share of terms that are products."""


@dataclass(frozen=True)
class Term:
    """A signed number, or a signed product of two numbers."""

    sign: Literal["+", "-"]
    factors: tuple[int, ...]

    @property
    def value(self) -> int:
        """The term's value, sign included."""
        product = self.factors[0] if len(self.factors) == 1 else self.factors[0] * self.factors[1]
        return product if self.sign == "+" else -product

    def __str__(self) -> str:
        return self.sign + "*".join(map(str, self.factors))


Problem = tuple[Term, ...]


def text(problem: Problem) -> str:
    """The problem as written: ``17+25-8*2``."""
    return "".join(map(str, problem)).removeprefix("+")


def answer(problem: Problem) -> int:
    """The problem's value."""
    return sum(term.value for term in problem)


def canonical(problem: Problem) -> str:
    """One text for all orders of the terms and of each product's factors."""
    terms = [Term(term.sign, tuple(sorted(term.factors))) for term in problem]
    return "".join(sorted(map(str, terms)))


def set_of(problem: Problem) -> Set:
    """The set to which the problem's canonical form belongs."""
    percent = int.from_bytes(hashlib.blake2b(canonical(problem).encode(), digest_size=8).digest(), "big") % 100
    for name, share in SHARE.items():
        if percent < share:
            return name
        percent -= share
    raise AssertionError("the shares of the sets do not add up to 100")


def draw(rng: random.Random) -> Problem:
    """One problem of random difficulty whose partial sums from left to right are never negative."""
    counts = list(TERM_COUNT_WEIGHTS)
    count = rng.choices(counts, [TERM_COUNT_WEIGHTS[count] for count in counts])[0]
    while True:
        terms = []
        for index in range(count):
            sign: Literal["+", "-"] = "+" if index == 0 or rng.random() < 0.6 else "-"
            if rng.random() < PRODUCT_SHARE:
                factors = (rng.randint(2, 5), rng.randint(2, 9))
            else:
                factors = (rng.randint(1, rng.choice((9, 9, 20, 30))),)
            terms.append(Term(sign, factors))
        if all(answer(tuple(terms[: end + 1])) >= 0 for end in range(count)):
            return tuple(terms)


def problems(name: Set, rng: random.Random) -> Iterator[Problem]:
    """An endless stream of one set's problems; a problem may come again."""
    while True:
        problem = draw(rng)
        if set_of(problem) == name:
            yield problem


def distinct(name: Set, count: int, rng: random.Random) -> list[Problem]:
    """`count` problems of one set, no two with the same canonical form."""
    found: dict[str, Problem] = {}
    stream = problems(name, rng)
    while len(found) < count:
        problem = next(stream)
        found.setdefault(canonical(problem), problem)
    return list(found.values())


def working(problem: Problem) -> list[str]:
    """Every rewriting of the problem up to its value: products first, then sums, one operation at a time."""
    terms, lines = list(problem), []
    while len(terms) > 1 or len(terms[0].factors) > 1:
        product = next((index for index, term in enumerate(terms) if len(term.factors) > 1), None)
        if product is not None:
            value = abs(terms[product].value)
            terms[product] = Term(terms[product].sign, (value,))
        else:
            terms[:2] = [Term("+", (terms[0].value + terms[1].value,))]
        lines.append(text(tuple(terms)))
    return lines


def solution(steps: list[str]) -> str:
    """A response: the steps shown, joined by ``=``, the last one boxed."""
    return "=".join([*steps[:-1], rf"\boxed{{{steps[-1]}}}"])


def prompt(problem: Problem) -> str:
    """The user's turn."""
    return text(problem) + "="


def write_jsonl(path: Path, rows: list[Problem]) -> None:
    """One ``{"prompt", "answer"}`` object per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"prompt": prompt(row), "answer": str(answer(row))}) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """Write the training and held-out rows."""
    parser = argparse.ArgumentParser(description="Write the arithmetic example's data sets.")
    parser.add_argument("--out", type=Path, required=True, help="folder for train.jsonl and heldout.jsonl")
    parser.add_argument("--seed", type=int, default=0, help="seed of the training rows; held-out rows never change")
    parser.add_argument("--train", type=int, default=4096, help="number of training rows")
    parser.add_argument("--heldout", type=int, default=2048, help="number of held-out rows")
    args = parser.parse_args()
    write_jsonl(args.out / "train.jsonl", distinct("train", args.train, random.Random(args.seed)))
    write_jsonl(args.out / "heldout.jsonl", distinct("heldout", args.heldout, random.Random("heldout")))


if __name__ == "__main__":
    main()
