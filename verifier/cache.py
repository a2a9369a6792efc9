"""A cache of verdicts: least recently used, bounded in entries and, by keeping digests for keys, in bytes."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from typing import Generic, TypeVar

V = TypeVar("V")


class VerdictCache(Generic[V]):
    """Maps (reference, answer) to a small value. With 0 entries it remembers nothing."""

    def __init__(self, entries: int) -> None:
        self._entries = entries
        self._values: OrderedDict[bytes, V] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, reference: str, answer: str) -> V | None:
        """The value, which becomes the most recently used, or None."""
        key = _key(reference, answer)
        value = self._values.get(key)
        if value is not None:
            self._values.move_to_end(key)
        return value

    def put(self, reference: str, answer: str, value: V) -> None:
        """Remember the value and forget the least recently used one beyond the bound."""
        if not self._entries:
            return
        self._values[_key(reference, answer)] = value
        self._values.move_to_end(_key(reference, answer))
        if len(self._values) > self._entries:
            self._values.popitem(last=False)


def _key(reference: str, answer: str) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    encoded = reference.encode("utf-8", "surrogatepass")
    digest.update(len(encoded).to_bytes(8, "big"))
    digest.update(encoded)
    digest.update(answer.encode("utf-8", "surrogatepass"))
    return digest.digest()
