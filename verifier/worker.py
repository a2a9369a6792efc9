"""A worker process: `python -m verifier.worker SETTINGS`, started by the pool, one task at a time.

INVARIANTS: the main thread grades, so that the soft limit's alarm reaches it; every task is answered by one Outcome or
by the death of the process; tasks arrive on stdin and outcomes leave on what was stdout, where nothing else writes.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable

import msgspec

from verifier import limits
from verifier.frames import Outcome, Ready, Settings, Task, read_frame, write_frame

REPEAT_S = 0.25
"""The alarm repeats: a `bare except` somewhere in sympy may have swallowed the first one."""

MEMORY_SHARE = 0.9
"""A process whose address space has come this near to its limit is replaced."""

Grader = Callable[[str, str], Outcome]


class SoftLimit(BaseException):
    """Raised in the main thread when a task has used up its soft limit."""


class Alarm:
    """Interrupts what runs inside `with` after `limit_s` of processor time, by SoftLimit.

    Processor time, since a busy machine must not turn honest answers into timeouts; the pool's hard limit is real time.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._armed = False
        signal.signal(signal.SIGPROF, self._ring)

    def _ring(self, _signal: int, _frame: object) -> None:
        if self._armed:
            raise SoftLimit

    def __enter__(self) -> None:
        self._armed = True
        signal.setitimer(signal.ITIMER_PROF, self._limit_s, REPEAT_S)

    def __exit__(self, *_exc: object) -> None:
        self._armed = False
        signal.setitimer(signal.ITIMER_PROF, 0)


def run_task(task: Task, graders: dict[str, Grader], settings: Settings, alarm: Alarm) -> Outcome:
    """Grade one task within its limits."""
    grader = graders.get(task.grader)
    if grader is None:
        return Outcome("error", f"unknown grader {task.grader!r}")
    limits.allow_cpu(settings.hard_limit_s)
    start = time.perf_counter()
    try:
        with alarm:
            outcome = grader(task.reference, task.answer)
    except SoftLimit:
        # Interrupted in the middle, sympy's caches may hold half-built objects.
        outcome = Outcome("timeout", f"soft limit of {settings.soft_limit_s:g} s", retire=True)
    except MemoryError:
        outcome = Outcome("timeout", "memory limit", retire=True)
    except Exception as error:
        outcome = Outcome("error", f"grader failed: {type(error).__name__}: {error}"[:500])
    if limits.peak_memory_mb() > settings.memory_limit_mb * MEMORY_SHARE:
        if outcome.status != "correct":
            outcome = Outcome("timeout", "memory limit")
        outcome = msgspec.structs.replace(outcome, retire=True)
    return msgspec.structs.replace(outcome, seconds=time.perf_counter() - start)


def take_pipes() -> tuple[int, int]:
    """Private copies of stdin and stdout; prints of the graded code's libraries go to stderr from now on."""
    tasks, outcomes = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(2, 1)
    os.close(null)
    return tasks, outcomes


def main() -> int:
    settings = msgspec.json.decode(sys.argv[1], type=Settings)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # a Ctrl-C at the terminal is the service's to handle
    isolated = limits.leave_network()
    limits.die_with(settings.parent_pid)
    limits.limit_memory(settings.memory_limit_mb)
    tasks, outcomes = take_pipes()

    from verifier import math

    math.quiet()
    math.warm_up()
    graders: dict[str, Grader] = {"math": math.grade}
    alarm = Alarm(settings.soft_limit_s)
    decoder = msgspec.msgpack.Decoder(Task)
    write_frame(outcomes, msgspec.msgpack.encode(Ready(os.getpid(), isolated)))
    while (body := read_frame(tasks)) is not None:
        outcome = run_task(decoder.decode(body), graders, settings, alarm)
        write_frame(outcomes, msgspec.msgpack.encode(outcome))
    return 0


if __name__ == "__main__":
    sys.exit(main())
