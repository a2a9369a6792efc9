"""The order in which tasks reach workers: round robin over owners, first come first served within one. Pure."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable, Iterable
from typing import Generic, TypeVar

Owner = TypeVar("Owner", bound=Hashable)
Item = TypeVar("Item")


class FairQueue(Generic[Owner, Item]):
    """Each owner with waiting items gets one turn per round, so that a big request does not starve a small one."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[Owner, deque[Item]] = OrderedDict()
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def extend(self, owner: Owner, items: Iterable[Item]) -> None:
        """Append items to the owner's line; a new owner has its turn after those who wait already."""
        line = self._waiting.setdefault(owner, deque())
        before = len(line)
        line.extend(items)
        self._size += len(line) - before
        if not line:
            del self._waiting[owner]

    def push_front(self, owner: Owner, item: Item) -> None:
        """Put an item back that was taken before: it is next of all."""
        self._waiting.setdefault(owner, deque()).appendleft(item)
        self._waiting.move_to_end(owner, last=False)
        self._size += 1

    def pop(self) -> tuple[Owner, Item]:
        """The next item; IndexError if there is none. Its owner goes to the end of the round."""
        if not self._waiting:
            raise IndexError("the queue is empty")
        owner, line = self._waiting.popitem(last=False)
        item = line.popleft()
        self._size -= 1
        if line:
            self._waiting[owner] = line
        return owner, item

    def drop(self, owner: Owner) -> int:
        """Forget all items of an owner; returns how many there were."""
        dropped = len(self._waiting.pop(owner, ()))
        self._size -= dropped
        return dropped
