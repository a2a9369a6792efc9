"""Stage 1 to Stage 2: which draft stands in the refinement prompt (ALGORITHMS.md 1.1, 1.2, 1.9)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.config import SelectionRule, TieRule


@dataclass(frozen=True)
class GradedDraft:
    """What the choice looks at. reward: after shaping; tokens: length; formatted: it has an answer that can be read."""

    index: int
    reward: float
    tokens: int
    formatted: bool


def select_draft(drafts: Sequence[GradedDraft], rule: SelectionRule, ties: TieRule, rng: random.Random) -> int:
    """Index of the chosen draft. All-wrong groups still yield one (ALGORITHMS.md 1.2).

    `worst_formatted` falls back to `worst` where no draft is formatted. Raises ValueError without drafts or for `none`.
    """
    if not drafts:
        raise ValueError("no graded drafts to select from")
    pool = sorted(drafts, key=lambda draft: draft.index)
    match rule:
        case SelectionRule.BEST:
            target = max(draft.reward for draft in pool)
        case SelectionRule.WORST:
            target = min(draft.reward for draft in pool)
        case SelectionRule.WORST_FORMATTED:
            pool = [draft for draft in pool if draft.formatted] or pool
            target = min(draft.reward for draft in pool)
        case SelectionRule.RANDOM:
            return rng.choice(pool).index
        case SelectionRule.NONE:
            raise ValueError("rule none has no drafts")
    tied = [draft for draft in pool if draft.reward == target]
    match ties:
        case TieRule.FIRST:
            return tied[0].index
        case TieRule.RANDOM:
            return rng.choice(tied).index
        case TieRule.SHORTEST:
            return min(tied, key=lambda draft: draft.tokens).index
        case TieRule.LONGEST:
            return max(tied, key=lambda draft: draft.tokens).index
