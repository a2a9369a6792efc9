"""Starts services, watches them, and leaves nothing behind.

INVARIANTS: when `run` returns or raises, no process that it started lives, nor any descendant of one. The first
failure decides the outcome; what dies after it died of it. If this process is killed, the kernel kills the services
(PDEATHSIG, set by each service itself when IGRPO_SUPERVISOR names its parent) and they, likewise, their own children.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.child import Child, Service
from launch.process_tree import adopt_orphans, kill_descendants

SUPERVISOR_VARIABLE = "IGRPO_SUPERVISOR"
"""Environment variable with the supervisor's process id; services die with that process."""

_LAST_WORDS = re.compile(r"(orchestrator|verifier|trainer|rollout server [^ :]+): ")
"""How the one line begins in which a service says why it cannot go on."""

POLL_S = 60.0
"""Longest wait between two looks at the world; everything that matters wakes the watch by itself."""


@dataclass(frozen=True)
class Outcome:
    """How it ended. `failure`: what to tell people; empty after a success or a signal."""

    exit_code: int
    failure: str = ""


class Supervisor:
    """Runs services until the leading one ends.

    leader: its end with code 0 is the success of all; its stdout goes to `say`. may_end: others that may end before it
    with code 0. Every other end is a failure. Owns this process's SIGINT and SIGTERM handlers while it runs.
    """

    def __init__(
        self,
        services: Sequence[Service],
        log_dir: Path,
        *,
        leader: str,
        may_end: frozenset[str] = frozenset(),
        start_s: float,
        stop_s: float,
        say: Callable[[str], None],
    ) -> None:
        self._services = services
        self._log_dir = log_dir
        self._leader = leader
        self._may_end = may_end
        self._start_s = start_s
        self._stop_s = stop_s
        self._say = say
        self._signal: signal.Signals | None = None
        self._signalled = asyncio.Event()
        self._hurry = asyncio.Event()

    async def run(self) -> Outcome:
        """Start all at once, watch, stop all."""
        adopt_orphans()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._on_signal, number)
        os.environ[SUPERVISOR_VARIABLE] = str(os.getpid())
        children = [
            Child(
                service, self._log_dir / f"{service.name}.log", self._say if service.name == self._leader else _ignore
            )
            for service in self._services
        ]
        running = {asyncio.create_task(child.run(), name=child.name): child for child in children}
        try:
            return await self._watch(dict(running), children)
        finally:
            await self._stop(running)
            del os.environ[SUPERVISOR_VARIABLE]
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                loop.remove_signal_handler(number)
                if self._signal is not None:  # all is stopped; one more Ctrl-C must not spoil the exit code
                    signal.signal(number, signal.SIG_IGN)

    def _on_signal(self, number: signal.Signals) -> None:
        if self._signal is not None:
            self._hurry.set()  # a second Ctrl-C: no more patience
        self._signal = self._signal or number
        self._signalled.set()

    async def _watch(self, running: dict[asyncio.Task[int], Child], children: list[Child]) -> Outcome:
        started, announced = time.monotonic(), set[str]()
        signalled = asyncio.create_task(self._signalled.wait())
        try:
            while True:
                waiting = [child for child in running.values() if not child.ready_address.done()]
                left = started + self._start_s - time.monotonic()
                if waiting and left <= 0:
                    names = ", ".join(child.name for child in waiting)
                    return Outcome(1, f"not ready within {self._start_s:.0f} s: {names}; see {self._log_dir}")
                await asyncio.wait(
                    {*running, signalled, *(child.ready_address for child in waiting)},
                    timeout=min(left, POLL_S) if waiting else POLL_S,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                for child in children:
                    if child.ready_address.done() and child.name not in announced:
                        announced.add(child.name)
                        self._say(f"ready {child.name} after {time.monotonic() - started:.1f} s")
                if self._signal is not None:
                    return Outcome(128 + self._signal)
                if outcome := self._judge(running):
                    return outcome
        finally:
            signalled.cancel()

    def _judge(self, running: dict[asyncio.Task[int], Child]) -> Outcome | None:
        """The outcome that ended children decide, first end first; None: go on."""
        ended = sorted((task for task in running if task.done()), key=lambda task: running[task].ended_at)
        for task in ended:
            child = running.pop(task)
            if error := task.exception():
                return Outcome(1, f"{child.name}: {_reason(error)}")
            code = task.result()
            if child.name == self._leader and code == 0:
                return Outcome(0)
            if not (child.name in self._may_end and code == 0 and child.ready_address.done()):
                return Outcome(1, _obituary(child, code))
        return None

    async def _stop(self, running: dict[asyncio.Task[int], Child]) -> None:
        """SIGTERM, patience, SIGKILL to every descendant."""
        tasks = set(running)
        for child in running.values():
            child.terminate()
        hurry = asyncio.create_task(self._hurry.wait())
        end = time.monotonic() + self._stop_s
        while (alive := {task for task in tasks if not task.done()}) and not hurry.done():
            if (left := end - time.monotonic()) <= 0:
                break
            await asyncio.wait({*alive, hurry}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()
        for child in running.values():
            child.signal_group(signal.SIGKILL)
        await asyncio.to_thread(kill_descendants, os.getpid())
        await asyncio.wait(tasks, timeout=5.0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, hurry, return_exceptions=True)


def _ignore(line: str) -> None:
    pass


def _reason(error: BaseException) -> str:
    """One line for what went wrong around a child (its log could not be written, its program not be started)."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return f"{type(error).__name__}: {error}"


def _obituary(child: Child, code: int) -> str:
    """Name, exit and last lines of a child."""
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    if child.last_lines and _LAST_WORDS.match(child.last_lines[-1]):
        return f"{child.name} {how}: {child.last_lines[-1]} (log: {child.log_file})"
    lines = "".join(f"\n    {line}" for line in child.last_lines)
    return f"{child.name} {how}; last lines of {child.log_file}:{lines or ' none'}"
