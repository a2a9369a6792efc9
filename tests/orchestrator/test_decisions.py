"""Selection, rewards, data sets and membership."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from orchestrator.config import DataConfig, RewardConfig, SelectionRule, TieRule, TimeoutPolicy
from orchestrator.data import DataError, load_problems
from orchestrator.membership import Membership
from orchestrator.rewards import reward_of, shuffled
from orchestrator.selection import GradedDraft, select_draft
from protocol.messages import Verdict, VerdictStatus, Version

DRAFTS = [
    GradedDraft(0, 0.0, 9, False),
    GradedDraft(1, 1.0, 7, True),
    GradedDraft(2, 1.0, 3, True),
    GradedDraft(3, 0.0, 5, True),
    GradedDraft(4, 1.0, 8, True),
]


@pytest.mark.parametrize(
    ("rule", "ties", "chosen"),
    [
        (SelectionRule.BEST, TieRule.FIRST, 1),
        (SelectionRule.BEST, TieRule.SHORTEST, 2),
        (SelectionRule.BEST, TieRule.LONGEST, 4),
        (SelectionRule.WORST, TieRule.FIRST, 0),
        (SelectionRule.WORST_FORMATTED, TieRule.FIRST, 3),
    ],
)
def test_selection(rule: SelectionRule, ties: TieRule, chosen: int) -> None:
    assert select_draft(list(reversed(DRAFTS)), rule, ties, random.Random(0)) == chosen


@pytest.mark.parametrize("rule", [SelectionRule.RANDOM, SelectionRule.BEST])
def test_random_choices_are_seeded_and_reach_all(rule: SelectionRule) -> None:
    picks = [select_draft(DRAFTS, rule, TieRule.RANDOM, random.Random(seed)) for seed in range(60)]
    assert picks == [select_draft(DRAFTS, rule, TieRule.RANDOM, random.Random(seed)) for seed in range(60)]
    assert set(picks) == ({0, 1, 2, 3, 4} if rule is SelectionRule.RANDOM else {1, 2, 4})


def test_all_wrong_still_yields_a_draft() -> None:
    wrong = [GradedDraft(index, 0.0, 5, False) for index in range(3)]
    assert select_draft(wrong, SelectionRule.BEST, TieRule.FIRST, random.Random(0)) == 0
    assert select_draft(wrong, SelectionRule.WORST_FORMATTED, TieRule.FIRST, random.Random(0)) == 0


def test_best_of_n_succeeds_as_the_paper_says() -> None:
    """Proposition 3.1 of iGRPO: E[R(best)] = 1 - (1 - p)^N; N = 4, p = 0.3: 0.7599. 20,000 draws: s.e. 0.003."""
    rng = random.Random(3)
    hits = 0.0
    for _ in range(20_000):
        drafts = [GradedDraft(index, float(rng.random() < 0.3), 1, True) for index in range(4)]
        hits += drafts[select_draft(drafts, SelectionRule.BEST, TieRule.FIRST, rng)].reward
    assert hits / 20_000 == pytest.approx(0.7599, abs=0.012)


def verdict(status: VerdictStatus, score: float = 0.0, **parts: float) -> Verdict:
    return Verdict(id="x", status=status, score=score, parts=parts)


def test_an_error_is_never_a_zero_and_a_timeout_follows_its_policy() -> None:
    config = RewardConfig(weights={"accuracy": 1.0, "format": 0.5}, timeout=TimeoutPolicy.DROP, shuffle=False)
    assert reward_of(verdict(VerdictStatus.ERROR, 1.0), config) is None
    assert reward_of(verdict(VerdictStatus.CORRECT, float("nan")), config) is None
    assert reward_of(verdict(VerdictStatus.TIMEOUT), config) is None
    zero = config.model_copy(update={"timeout": TimeoutPolicy.ZERO})
    assert reward_of(verdict(VerdictStatus.TIMEOUT), zero) == 0.0
    assert reward_of(verdict(VerdictStatus.NO_ANSWER), config) == 0.0
    assert reward_of(verdict(VerdictStatus.CORRECT, 1.0, format=1.0, other=9.0), config) == 1.5


def test_shuffling_keeps_the_rewards_of_the_group() -> None:
    rewards = [1.0, 0.0, 0.0, 1.0, 0.5]
    assert sorted(shuffled(rewards, random.Random(1))) == sorted(rewards)


def data_config(**changes: str) -> DataConfig:
    return DataConfig.model_validate({"train": "x.jsonl", **changes})


def test_jsonl_and_parquet_give_the_same_problems(tmp_path: Path) -> None:
    rows = [{"q": "1+1", "a": 2}, {"q": "2+2", "a": 4}]
    jsonl, parquet = tmp_path / "d.jsonl", tmp_path / "d.parquet"
    jsonl.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), parquet)
    config = data_config(prompt_column="q", answer_column="a")
    problems = load_problems(str(jsonl), config, split="")
    assert problems == load_problems(str(parquet), config, split="")
    assert [p.answer for p in problems] == ["2", "4"] and problems[0].messages[0].content == "1+1"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"prompt": "x"', "d.jsonl:2: not JSON"),
        ('["x"]', "d.jsonl:2: expected an object"),
        ('{"prompt": "x"}', "d.jsonl:2: no field 'answer'"),
        ('{"prompt": "", "answer": "1"}', "d.jsonl:2: field 'prompt'"),
        ('{"prompt": [{"role": "user"}], "answer": "1"}', "d.jsonl:2: field 'prompt'"),
        ('{"prompt": "x", "answer": null}', "d.jsonl:2: field 'answer'"),
        ('{"prompt": "\\ud800", "answer": "1"}', "d.jsonl:2: field 'prompt': holds half a surrogate"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, line: str, says: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"prompt": "1+1", "answer": "2"}\n' + line + "\n")
    with pytest.raises(DataError, match=says):
        load_problems(str(path), data_config(), split="")


def test_missing_and_empty_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl: cannot be read"):
        load_problems(str(tmp_path / "none.jsonl"), data_config(), split="")
    (tmp_path / "e.jsonl").write_text("\n")
    with pytest.raises(DataError, match="no rows"):
        load_problems(str(tmp_path / "e.jsonl"), data_config(), split="")


def fleet() -> Membership:
    membership = Membership(silent_s=10.0)
    for name in ("a", "b"):
        membership.hello(name, f"tcp://{name}", 8, 1024, 0.0)
        membership.seen(name, Version(1, 0), ready=True, now=0.0)
    return membership


def pick(
    membership: Membership, samples: int = 4, prefer: str | None = None, now: float = 1.0, low: int = 0
) -> str | None:
    replica = membership.pick(samples, incarnation=1, fresh=lambda step: step >= low, prefer=prefer, now=now)
    return replica.name if replica else None


def test_the_least_loaded_replica_gets_work_and_the_preferred_one_first() -> None:
    membership = fleet()
    membership.replicas["a"].in_flight = 4
    assert pick(membership) == "b"
    assert pick(membership, prefer="a") == "a"
    assert pick(membership, samples=6, prefer="a") == "b", "no room at the preferred one"


def test_silent_failed_stale_and_foreign_replicas_get_nothing() -> None:
    membership = fleet()
    membership.failed(membership.replicas["a"], 1.0)
    membership.seen("b", Version(2, 5), ready=True, now=1.0)
    assert pick(membership) is None
    assert pick(membership, now=3.0) == "a", "its back-off has ended"
    assert pick(membership, now=30.0) is None, "nobody has said anything for longer than silent_s"
    membership.seen("b", Version(1, 5), ready=True, now=3.0)
    assert pick(membership, now=3.0, low=5) == "b"


def test_back_off_grows_counts_what_fails_together_once_and_ends_with_success() -> None:
    membership = fleet()
    replica = membership.replicas["a"]
    pauses, now = [], 0.0
    for _ in range(2000):
        for _ in range(5):
            membership.failed(replica, now)
        pauses.append(replica.blocked_until - now)
        now = replica.blocked_until
    assert replica.failures == 2000
    assert 0.25 <= pauses[0] <= 0.5 and max(pauses) <= 30.0 and pauses[-1] >= 15.0
    membership.succeeded(replica)
    assert replica.blocked_until == 0.0 and replica.failures == 0


def test_a_replica_that_is_held_for_somebody_else_is_not_given_away() -> None:
    membership = fleet()
    replica = membership.pick(4, incarnation=1, fresh=lambda step: True, prefer="a", now=1.0, held={"a"})
    assert replica is not None and replica.name == "b"
