"""The fair queue: round robin, nothing lost, nothing twice."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from verifier.cache import VerdictCache
from verifier.fair_queue import FairQueue

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("extend"), st.integers(0, 4), st.integers(0, 5)),
        st.tuples(st.just("pop"), st.just(0), st.just(0)),
        st.tuples(st.just("back"), st.just(0), st.just(0)),
        st.tuples(st.just("drop"), st.integers(0, 4), st.just(0)),
    ),
    max_size=60,
)


@given(STEPS)
def test_items_leave_once_in_their_owners_order(steps: list[tuple[str, int, int]]) -> None:
    queue: FairQueue[int, int] = FairQueue()
    model: dict[int, list[int]] = {}
    taken: tuple[int, int] | None = None
    number = 0
    for step, owner, count in steps:
        if step == "extend":
            items = list(range(number, number + count))
            number += count
            queue.extend(owner, items)
            model.setdefault(owner, []).extend(items)
        elif step == "pop" and len(queue):
            taken = queue.pop()
            assert model[taken[0]].pop(0) == taken[1]
        elif step == "back" and taken:
            queue.push_front(*taken)
            model.setdefault(taken[0], []).insert(0, taken[1])
            assert queue.pop() == taken
            model[taken[0]].pop(0)
        elif step == "drop":
            assert queue.drop(owner) == len(model.pop(owner, []))
        assert len(queue) == sum(map(len, model.values()))


def test_a_big_owner_does_not_starve_a_small_one() -> None:
    queue: FairQueue[str, int] = FairQueue()
    queue.extend("big", range(100))
    queue.extend("small", range(2))
    assert [queue.pop()[0] for _ in range(5)] == ["big", "small", "big", "small", "big"]


def test_cache_forgets_the_least_recently_used() -> None:
    cache: VerdictCache[int] = VerdictCache(2)
    cache.put("1", "a", 1)
    cache.put("1", "b", 2)
    assert cache.get("1", "a") == 1
    cache.put("1", "c", 3)
    assert (cache.get("1", "a"), cache.get("1", "b"), cache.get("1", "c"), len(cache)) == (1, None, 3, 2)
    assert cache.get("1a", "") is None


def test_cache_of_no_entries_remembers_nothing() -> None:
    cache: VerdictCache[int] = VerdictCache(0)
    cache.put("1", "a", 1)
    assert cache.get("1", "a") is None
