"""Linux process trees: who descends from us, and how to be sure that nobody is left."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections import defaultdict
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans() -> None:
    """Descendants whose parent dies become children of this process, so that `descendants` still finds them."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def descendants(root: int) -> list[int]:
    """Ids of all living (not zombie) processes below `root`, parents first."""
    children: dict[int, list[int]] = defaultdict(list)
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):  # it ended while we looked
            state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            children[int(parent)].append(int(entry.name) if state != "Z" else -int(entry.name))
    found: list[int] = []
    queue = [root]
    while queue:
        for child in children[queue.pop(0)]:
            queue.append(abs(child))
            found += [child] if child > 0 else []
    return found


def kill_descendants(root: int, wait_s: float = 5.0) -> list[int]:
    """SIGKILL everything below `root` and wait until it is gone; returns what still lives after `wait_s`."""
    end = time.monotonic() + wait_s
    while left := descendants(root):
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > end:
            return left
        time.sleep(0.02)
    return []
