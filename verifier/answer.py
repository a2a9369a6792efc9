r"""Reading a completion: its final `\boxed{}` answer and its format. Pure, linear in the text, safe on any text."""

from __future__ import annotations

import re
from dataclasses import dataclass

BOX = "\\boxed"

MAX_JOINED_BOXES = 6
r"""`\boxed{1}, \boxed{2} and \boxed{3}` is one answer, `1,2,3`; math-verify joins up to six as well."""

_JOIN = re.compile(r"[\s$]{0,8}(?:,|;|,?\s?and|,?\s?or)[\s$]{0,8}")
_BRACE = re.compile(r"[{}]")
_AFTER_BOX = re.compile(r"(?:\s|[.$]|\\\)|\\\])*")
_THINK_ANSWER = re.compile(r"<think>(?P<think>.*?)</think>\s*<answer>(?P<answer>.*?)</answer>\s*", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Box:
    r"""One terminated `\boxed{content}` at text[start:end]."""

    content: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Extraction:
    """What the completion answers. answer None: nothing to grade, and `problem` says why."""

    answer: str | None
    problem: str = ""


def _box_at(text: str, start: int, end: int) -> Box | None:
    """The box whose command begins at `start`, closed before `end`, or None if it is not well-formed."""
    opening = start + len(BOX)
    while opening < end and text[opening].isspace():
        opening += 1
    if opening >= end or text[opening] != "{":
        return None
    depth = 0
    for brace in _BRACE.finditer(text, opening, end):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return Box(text[opening + 1 : brace.start()].strip(), start, brace.end())
    return None


def last_box(text: str) -> Box | None:
    r"""The last `\boxed` of the text, or None if there is none or that one is not well-formed."""
    start = text.rfind(BOX)
    return _box_at(text, start, len(text)) if start >= 0 else None


def extract(text: str) -> Extraction:
    r"""The content of the last `\boxed{}`. An unterminated last box earns nothing, whatever came before it.

    Boxes joined by a comma, "and" or "or" right before it belong to the answer: their contents, joined by commas.
    """
    if BOX not in text:
        return Extraction(None, "no_box")
    box = last_box(text)
    if box is None:
        return Extraction(None, "unterminated_box")
    contents = [box.content]
    while len(contents) < MAX_JOINED_BOXES:
        before = text.rfind(BOX, 0, box.start)
        previous = _box_at(text, before, box.start) if before >= 0 else None
        if previous is None or not _JOIN.fullmatch(text, previous.end, box.start):
            break
        box = previous
        if box.content != contents[0]:
            contents.insert(0, box.content)
    answer = ",".join(contents).strip()
    return Extraction(answer) if answer else Extraction(None, "empty_box")


def boxed_end(text: str) -> bool:
    r"""Exactly one `\boxed`, well-formed, not empty, and nothing after it but white space, `.`, `$`, `\)` and `\]`."""
    box = last_box(text)
    return (
        box is not None
        and text.find(BOX) == box.start
        and bool(box.content)
        and _AFTER_BOX.fullmatch(text, box.end) is not None
    )


def think_answer(text: str) -> bool:
    """`<think>…</think><answer>…</answer>`, each tag once, both parts non-empty, nothing before or after.

    The paper's format; white space between the tags is free, as its system instruction writes none (ALGORITHMS §1.3).
    """
    match = _THINK_ANSWER.fullmatch(text.strip())
    if match is None or any(text.count(tag) != 1 for tag in ("<think>", "</think>", "<answer>", "</answer>")):
        return False
    return bool(match["think"].strip()) and bool(match["answer"].strip())
