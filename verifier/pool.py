"""The pool of worker processes: an asyncio shell around the fair queue.

INVARIANTS
- Every submitted task gives exactly one Outcome to its batch, unless the batch is cancelled; then none follows, and
  within `cancel_grace_s` no worker works for it.
- No task holds a worker longer than `hard_limit_s`: the worker is killed and replaced.
- At most `workers` tasks hold a place; one that runs longer than `slow_after_s` goes aside (at most `long_runners`
  do), so that it does not keep the next one waiting.
- At most `workers + long_runners + spare_workers` processes live, plus those being killed. All die with the service.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from verifier.fair_queue import FairQueue
from verifier.frames import Outcome, Settings, Task
from verifier.process import WORKER_COMMAND, WorkerDiedError, WorkerProcess, start_worker

log = logging.getLogger(__name__)

RETIRE_S = 1.0
"""A retired worker gets its end of stream and this long before it is killed."""

BACKOFF_S = (0.1, 5.0)
"""First and longest pause between attempts to start a worker that does not come up."""


class QueueFullError(Exception):
    """The batch would exceed `max_queued`."""


class StartError(Exception):
    """No worker process came up."""


@dataclass(frozen=True)
class PoolLimits:
    """See VerifierConfig, whose fields these are."""

    workers: int
    spare_workers: int = 1
    long_runners: int = 8
    slow_after_s: float = 0.5
    soft_limit_s: float = 2.0
    hard_limit_s: float = 5.0
    cancel_grace_s: float = 0.1
    memory_limit_mb: int = 1024
    recycle_after: int = 5000
    crash_retries: int = 1
    start_timeout_s: float = 60.0
    max_queued: int = 16384


@dataclass
class PoolCounters:
    """What has happened so far, for metrics and tests."""

    started: int = 0
    killed: int = 0
    crashed: int = 0
    recycled: int = 0
    aside: int = 0


class Batch:
    """The tasks of one request on their way through the pool. Outcomes come in the order in which they end."""

    def __init__(self, size: int) -> None:
        self.outstanding = size
        self.cancelled = False
        self._ready: list[tuple[int, Outcome]] = []
        self._event = asyncio.Event()

    def put(self, index: int, outcome: Outcome) -> None:
        """Called by the pool, once per task."""
        self.outstanding -= 1
        self._ready.append((index, outcome))
        self._event.set()

    async def take(self) -> list[tuple[int, Outcome]]:
        """All (index of the task, outcome) not taken yet; waits for at least one. The caller bounds the wait."""
        await self._event.wait()
        self._event.clear()
        ready, self._ready = self._ready, []
        return ready


@dataclass(eq=False)
class _Entry:
    batch: Batch
    index: int
    task: Task
    queued_at: float
    crashes: int = 0


@dataclass(eq=False)
class _Running:
    entry: _Entry
    worker: WorkerProcess
    aside: bool = False
    cancelled: bool = False


@dataclass
class _State:
    queue: FairQueue[Batch, _Entry] = field(default_factory=FairQueue)
    idle: list[WorkerProcess] = field(default_factory=list)
    running: set[_Running] = field(default_factory=set)
    starting: int = 0


class Pool:
    """Runs tasks in worker processes. Use from one event loop: `start`, `submit` / `cancel`, `close`."""

    def __init__(
        self,
        limits: PoolLimits,
        *,
        command: tuple[str, ...] = WORKER_COMMAND,
        on_change: Callable[[], None] | None = None,
        on_dequeue: Callable[[float], None] | None = None,
    ) -> None:
        self.limits = limits
        self.counters = PoolCounters()
        self.isolated = True
        self._command = command
        self._on_change = on_change or (lambda: None)
        self._on_dequeue = on_dequeue or (lambda _age_s: None)
        self._settings = Settings(limits.soft_limit_s, limits.hard_limit_s, limits.memory_limit_mb, os.getpid())
        self._state = _State()
        self._tasks: set[asyncio.Task[None]] = set()
        self._alive: set[WorkerProcess] = set()
        self._first_worker = asyncio.Event()
        self._failed_starts = 0
        self._start_problem = ""
        self._closed = False

    # -- what others see -------------------------------------------------------------------------------------------

    @property
    def queued(self) -> int:
        """Tasks that wait for a worker."""
        return len(self._state.queue)

    @property
    def busy(self) -> int:
        """Workers that work on a task."""
        return len(self._state.running)

    @property
    def live(self) -> int:
        """Workers that are ready or work."""
        return len(self._state.idle) + len(self._state.running)

    @property
    def pids(self) -> list[int]:
        """Of every process that belongs to the pool, starting ones included."""
        return [worker.pid for worker in self._alive]

    @property
    def problem(self) -> str:
        """Why no worker is there; empty if one is."""
        return "" if self.live else self._start_problem or "no worker is ready"

    async def start(self) -> None:
        """Start all workers and wait for the first. StartError after `start_timeout_s` if none came."""
        self._refill()
        try:
            async with asyncio.timeout(self.limits.start_timeout_s):
                await self._first_worker.wait()
        except TimeoutError:
            await self.close()
            late = f"no worker was ready within {self.limits.start_timeout_s:g} s"
            raise StartError(self._start_problem or late) from None

    def submit(self, tasks: Sequence[Task]) -> Batch:
        """Queue tasks as one batch, all or none; QueueFullError if they do not fit."""
        if self._closed:
            raise StartError("the pool is closed")
        if self.queued + len(tasks) > self.limits.max_queued:
            raise QueueFullError(f"{self.queued} of {self.limits.max_queued} places are taken")
        batch = Batch(len(tasks))
        now = time.monotonic()
        self._state.queue.extend(batch, [_Entry(batch, index, task, now) for index, task in enumerate(tasks)])
        self._pump()
        return batch

    def cancel(self, batch: Batch) -> None:
        """Forget the batch: its queued tasks now, its running ones after `cancel_grace_s`, by killing their workers."""
        batch.cancelled = True
        self._state.queue.drop(batch)
        loop = asyncio.get_running_loop()
        for running in self._state.running:
            if running.entry.batch is batch:
                running.cancelled = True
                loop.call_later(self.limits.cancel_grace_s, self._kill_if_running, running)

    async def close(self) -> None:
        """Kill all workers and wait for their end. Outstanding batches get no further outcome."""
        self._closed = True
        for worker in self._alive:
            worker.kill()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for worker in list(self._alive):
            worker.kill()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(5.0):
                    await worker.wait()
        self._alive.clear()
        self._state = _State()

    # -- scheduling ------------------------------------------------------------------------------------------------

    def _pump(self) -> None:
        """Give waiting tasks to idle workers while there are places, then see that enough workers are coming."""
        state = self._state
        while not self._closed and len(state.queue) and state.idle and self._places_taken() < self.limits.workers:
            worker = state.idle.pop()
            if not worker.alive:
                continue
            _, entry = state.queue.pop()
            self._on_dequeue(time.monotonic() - entry.queued_at)
            running = _Running(entry, worker)
            state.running.add(running)
            self._spawn(self._run(running))
        self._refill()
        self._on_change()

    def _places_taken(self) -> int:
        return sum(not running.aside for running in self._state.running)

    def _aside(self) -> int:
        return sum(running.aside for running in self._state.running)

    def _refill(self) -> None:
        if self._closed:
            return
        wanted = self.limits.workers + self.limits.spare_workers
        have = len(self._state.idle) + self._state.starting + self._places_taken()
        for _ in range(wanted - have):
            self._state.starting += 1
            self._spawn(self._start_one())

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- one worker ------------------------------------------------------------------------------------------------

    async def _start_one(self) -> None:
        if self._failed_starts:
            first, longest = BACKOFF_S
            await asyncio.sleep(min(longest, first * 2 ** min(self._failed_starts - 1, 10)))
        worker: WorkerProcess | None = None
        try:
            async with asyncio.timeout(self.limits.start_timeout_s):
                worker = await start_worker(self._settings, self._command)
                self._alive.add(worker)
                await worker.handshake()
        except (OSError, TimeoutError, WorkerDiedError, msgspec.MsgspecError) as error:
            self._failed_starts += 1
            self._start_problem = f"a worker does not start: {type(error).__name__}: {error}"
            log.warning("%s", self._start_problem)
            if worker is not None:
                await self._reap(worker, kill=True)
            return self._start_ended()
        except asyncio.CancelledError:
            if worker is not None:
                worker.kill()
            raise
        self._failed_starts = 0
        self._start_problem = ""
        self.counters.started += 1
        self.isolated = self.isolated and worker.isolated
        self._state.idle.append(worker)
        self._first_worker.set()
        self._start_ended()
        await self._watch(worker)

    def _start_ended(self) -> None:
        self._state.starting -= 1
        self._pump()

    async def _watch(self, worker: WorkerProcess) -> None:
        """Notice the end of a worker, above all of an idle one."""
        await worker.wait()
        self._alive.discard(worker)
        if worker in self._state.idle:
            self._state.idle.remove(worker)
            self.counters.crashed += 1
            log.warning("worker %d ended while it was idle", worker.pid)
            self._pump()

    async def _reap(self, worker: WorkerProcess, *, kill: bool) -> None:
        if kill:
            worker.kill()
        else:
            worker.dismiss()
        try:
            async with asyncio.timeout(RETIRE_S):
                await worker.wait()
        except TimeoutError:
            worker.kill()
            await worker.wait()
        self._alive.discard(worker)

    # -- one task --------------------------------------------------------------------------------------------------

    async def _run(self, running: _Running) -> None:
        """Run one task on one worker, to an outcome, a retry, or nothing if its batch was cancelled."""
        entry, worker, limits = running.entry, running.worker, self.limits
        start = time.monotonic()
        exchange = asyncio.ensure_future(worker.exchange(entry.task))
        outcome: Outcome | None = None
        try:
            done, _ = await asyncio.wait({exchange}, timeout=min(limits.slow_after_s, limits.hard_limit_s))
            if not done:
                self._step_aside(running)
                left = max(0.0, limits.hard_limit_s - (time.monotonic() - start))
                done, _ = await asyncio.wait({exchange}, timeout=left)
            if done:
                outcome = exchange.result()
            else:
                detail = f"hard limit of {limits.hard_limit_s:g} s"
                outcome = Outcome("timeout", detail, time.monotonic() - start, retire=True)
                self.counters.killed += 1
                worker.kill()
        except WorkerDiedError:
            worker.kill()
            if not running.cancelled:
                self.counters.crashed += 1
        finally:
            exchange.cancel()
            self._state.running.discard(running)
        self._release(running, outcome)
        if not running.cancelled:
            self._settle(entry, outcome)
        self._pump()

    def _step_aside(self, running: _Running) -> None:
        if self._aside() >= self.limits.long_runners:
            return
        running.aside = True
        self.counters.aside += 1
        running.worker.yield_processor()
        self._pump()

    def _release(self, running: _Running, outcome: Outcome | None) -> None:
        """Put the worker back, or end it: killed, dead, long aside (its priority stays low), worn or asking for it."""
        worker = running.worker
        if outcome is None or not worker.alive:
            return self._spawn(self._reap(worker, kill=True))
        if outcome.retire or running.aside or worker.served >= self.limits.recycle_after:
            self.counters.recycled += 1
            return self._spawn(self._reap(worker, kill=False))
        self._state.idle.append(worker)

    def _settle(self, entry: _Entry, outcome: Outcome | None) -> None:
        """Deliver the outcome; a task whose worker died is tried again by another one, then it is an error."""
        if entry.batch.cancelled:
            return
        if outcome is None:
            entry.crashes += 1
            if entry.crashes <= self.limits.crash_retries:
                return self._state.queue.push_front(entry.batch, entry)
            outcome = Outcome("error", f"worker died {entry.crashes} times")
        entry.batch.put(entry.index, outcome)

    def _kill_if_running(self, running: _Running) -> None:
        if running in self._state.running:
            self.counters.killed += 1
            running.worker.kill()
