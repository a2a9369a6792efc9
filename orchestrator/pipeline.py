"""Admission, staleness and assembly: the state machine of every prompt between data and trainer.

Pure: no clock, no tasks, no sockets; time comes in as an argument and decisions go out as actions.

INVARIANTS
- `outstanding` groups are those admitted and neither terminal, nor re-queued, nor part of a completed step; it never
  exceeds (S+1)*P, and every way out frees its slot in the same transition.
- A batch is assembled for a named target step, in step order, and whole; lag = target - oldest refinement step <= S.
- Every key reaches exactly one terminal stage (trained, filtered, abandoned) per epoch, or goes back to the data.
- From every reachable state with data left and one live replica, a batch eventually fills (tests/orchestrator).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

from orchestrator.config import LastBatch, OnStale
from orchestrator.data import Key


class Stage(StrEnum):
    DRAFTING = "drafting"
    SELECTING = "selecting"
    REFINING = "refining"
    GRADING = "grading"
    READY = "ready"
    PUSHED = "pushed"
    TRAINED = "trained"
    FILTERED = "filtered"
    ABANDONED = "abandoned"


TERMINAL = frozenset({Stage.TRAINED, Stage.FILTERED, Stage.ABANDONED})
GENERATING = frozenset({Stage.REFINING, Stage.GRADING})


@dataclass
class Group:
    """One prompt's way through the pipeline. `order`: admission number. `step`: oldest policy step of its refinements:

    the served step at dispatch while they run, the oldest token's once they are ready, None before.
    """

    key: Key
    order: int
    stage: Stage = Stage.DRAFTING
    step: int | None = None
    restarts: int = 0


@dataclass(frozen=True)
class Dispatch:
    """Push the groups of `keys`, in this order, as the whole batch for `step`."""

    step: int
    keys: tuple[Key, ...]


@dataclass(frozen=True)
class Restart:
    """Stop the refinement of `key` and start it again from the same draft."""

    key: Key


@dataclass(frozen=True)
class Leave:
    """Stop all work on `key`: it has reached a terminal stage."""

    key: Key


@dataclass(frozen=True)
class WakeAt:
    """Nothing to do now; ask again at `time` (or when anything changes)."""

    time: float


Action = Dispatch | Restart | Leave | WakeAt


@dataclass(frozen=True)
class PipelineRules:
    """What the configuration fixes. P = prompts_per_step, S = max_staleness; stale_wait_s in seconds."""

    prompts_per_step: int
    max_staleness: int
    total_steps: int
    max_attempts: int
    on_stale: OnStale
    stale_wait_s: float
    last_batch: LastBatch


@dataclass
class Pipeline:
    """See the module's INVARIANTS. Raises ValueError on a transition that cannot be."""

    rules: PipelineRules
    next_step: int = 0
    groups: dict[Key, Group] = field(default_factory=dict)
    terminal: dict[Key, tuple[Stage, str]] = field(default_factory=dict)
    attempts: Counter[Key] = field(default_factory=Counter)
    _pushed: dict[int, tuple[Key, ...]] = field(default_factory=dict)
    _admitted: int = 0
    _completed: int = 0
    _blocked_since: dict[Key, float] = field(default_factory=dict)
    _line: dict[Key, int] | None = None

    # -- queries -----------------------------------------------------------------------------------------------------

    @property
    def outstanding(self) -> int:
        return len(self.groups)

    @property
    def completed_steps(self) -> int:
        return self._completed

    @property
    def finished(self) -> bool:
        return self._completed >= self.rules.total_steps

    def can_admit(self) -> bool:
        """Window: outstanding < (S+1)*P, and no more than the steps that are left can train."""
        rules = self.rules
        window = (rules.max_staleness + 1) * rules.prompts_per_step
        wanted = (rules.total_steps - self._completed) * rules.prompts_per_step
        return len(self.groups) < min(window, wanted)

    def target_step(self, key: Key) -> int:
        """The step that `key` will be trained at if nothing ahead of it leaves."""
        if self._line is None:
            self._line = self._line_up()
        return self.next_step + self._line[key]

    def _line_up(self) -> dict[Key, int]:
        """Batches ahead of each group that is not pushed: they fill up in order, within epochs where that counts."""
        rules, line = self.rules, dict[Key, int]()
        carry = rules.last_batch is LastBatch.CARRY
        batch = filled = 0
        epoch: int | None = None
        waiting = [group for group in self.groups.values() if group.stage is not Stage.PUSHED]
        for group in sorted(waiting, key=lambda g: (0 if carry else g.key[0], g.order)):
            new_epoch = not carry and filled > 0 and group.key[0] != epoch
            if filled == rules.prompts_per_step or (new_epoch and rules.last_batch is LastBatch.SHORT):
                batch, filled = batch + 1, 0
            elif new_epoch:
                filled = 0
            line[group.key] = batch
            filled, epoch = filled + 1, group.key[0]
        return line

    def may_refine(self, key: Key, served_step: int) -> bool:
        """Whether refinements sampled at `served_step` are fresh enough for the step they will be trained at.

        False for a group that has left: its request may still wait for a replica while its task is being stopped.
        """
        return key in self.groups and self.target_step(key) - served_step <= self.rules.max_staleness

    def may_draft(self, key: Key, served_step: int) -> bool:
        """Drafts carry no gradient, so any policy will do; with S = 0 both stages wait for the published one."""
        return self.rules.max_staleness > 0 or self.may_refine(key, served_step)

    # -- transitions -------------------------------------------------------------------------------------------------

    def admit(self, key: Key) -> Group:
        if not self.can_admit():
            raise ValueError("the window is full")
        if key in self.groups or key in self.terminal:
            raise ValueError(f"{key} was admitted before")
        self.attempts[key] += 1
        group = self.groups[key] = Group(key, self._admitted)
        self._admitted += 1
        self._line = None
        return group

    def move(self, key: Key, stage: Stage, *, step: int | None = None) -> None:
        """A step forward before `ready`; entering REFINING names the policy step that serves it."""
        group = self._open(key)
        if stage in TERMINAL or stage in (Stage.READY, Stage.PUSHED):
            raise ValueError(f"{stage} has a transition of its own")
        if (stage is Stage.REFINING) == (step is None):
            raise ValueError("exactly the transition to refining names a step")
        group.stage = stage
        if stage is Stage.REFINING:
            group.step = step if group.step is None else min(group.step, step or 0)
        elif stage in (Stage.DRAFTING, Stage.SELECTING):
            group.step = None

    def ready(self, key: Key, oldest_step: int) -> None:
        """All refinements are graded; `oldest_step` is that of their oldest token."""
        group = self._open(key)
        group.stage, group.step = Stage.READY, oldest_step
        self._blocked_since.pop(key, None)

    def leave(self, key: Key, stage: Stage, reason: str) -> None:
        """A terminal stage other than trained."""
        if stage not in (Stage.FILTERED, Stage.ABANDONED):
            raise ValueError(f"{stage} is not a way out")
        self._close(key, stage, reason)

    def requeue(self, key: Key, reason: str) -> bool:
        """Give `key` back to the data for another attempt; False if it had its last one and is abandoned instead."""
        if self.attempts[key] >= self.rules.max_attempts:
            self._close(key, Stage.ABANDONED, reason)
            return False
        self._open(key)
        self._forget(key)
        return True

    def step_done(self, step: int) -> tuple[Key, ...]:
        """The batch of `step` has been trained; its slots are free."""
        keys = self._pushed.pop(step)
        for key in keys:
            self._forget(key)
            self.terminal[key] = (Stage.TRAINED, f"step {step}")
        self._completed = max(self._completed, step + 1)
        return keys

    # -- assembly ----------------------------------------------------------------------------------------------------

    def plan(self, now: float, *, data_left: bool, drained: Callable[[int], bool]) -> list[Action]:
        """All that can be decided at `now` (seconds). `drained(epoch)`: all prompts of the epoch have been admitted."""
        actions: list[Action] = []
        while self.next_step < self.rules.total_steps:
            actions += self._expire_ready()
            pool = self._pool()
            ready = [group for group in pool if group.stage is Stage.READY]
            size = self._batch_size(pool, ready, data_left=data_left, drained=drained)
            if size is None:
                break
            if size == 0:
                for group in ready:
                    self._close(group.key, Stage.FILTERED, "last_batch")
                    actions.append(Leave(group.key))
                if not ready:
                    break
                continue
            late = self._would_expire(pool, size)
            if late and self.rules.on_stale is OnStale.WAIT:
                for group in late:
                    self._blocked_since.setdefault(group.key, now)
                waits = [self._blocked_since[group.key] + self.rules.stale_wait_s for group in late]
                over = [group for group, time in zip(late, waits, strict=True) if time <= now]
                if not over:
                    actions.append(WakeAt(min(waits)))
                    break
                actions += [self._restart(group) for group in over]
                continue
            actions += [self._restart(group) for group in late]
            keys = tuple(group.key for group in sorted(ready, key=_age)[:size])
            for key in keys:
                self.groups[key].stage = Stage.PUSHED
            self._pushed[self.next_step] = keys
            self._line = None
            actions.append(Dispatch(self.next_step, keys))
            self.next_step += 1
            actions += [self._restart(group) for group in self._in_flight() if self._expires(group, self.next_step - 1)]
        return actions

    def _pool(self) -> list[Group]:
        """Groups that may go into the next batch: all, or those of the oldest epoch where batches end with epochs."""
        pool = [group for group in self.groups.values() if group.stage is not Stage.PUSHED]
        if self.rules.last_batch is LastBatch.CARRY or not pool:
            return pool
        epoch = min(group.key[0] for group in pool)
        return [group for group in pool if group.key[0] == epoch]

    def _batch_size(
        self, pool: list[Group], ready: list[Group], *, data_left: bool, drained: Callable[[int], bool]
    ) -> int | None:
        """Groups in the next batch; None: not yet; 0: what is ready never becomes a batch."""
        if len(ready) >= self.rules.prompts_per_step:
            return self.rules.prompts_per_step
        if not ready or len(ready) < len(pool):
            return None
        if self.rules.last_batch is LastBatch.CARRY:
            return None if data_left else len(ready)
        if not drained(ready[0].key[0]):
            return None
        return len(ready) if self.rules.last_batch is LastBatch.SHORT else 0

    def _would_expire(self, pool: list[Group], size: int) -> list[Group]:
        """Groups in flight that belong into the next batch by age and would be too old for the one after."""
        line = sorted((group for group in pool if group.step is not None), key=_age)[:size]
        return [group for group in line if group.stage in GENERATING and self._expires(group, self.next_step)]

    def _expires(self, group: Group, step: int) -> bool:
        """Whether `group` is too old for every batch after that of `step`."""
        return group.step is not None and group.step + self.rules.max_staleness <= step

    def _in_flight(self) -> list[Group]:
        return [group for group in self.groups.values() if group.stage in GENERATING]

    def _expire_ready(self) -> list[Action]:
        late = [g for g in self.groups.values() if g.stage is Stage.READY and self._expires(g, self.next_step - 1)]
        return [self._restart(group) for group in late]

    def _restart(self, group: Group) -> Action:
        """Its refinements are too old: from the same draft again, or out (`drop`, or after max_attempts)."""
        group.restarts += 1
        if self.rules.on_stale is OnStale.DROP:
            self._close(group.key, Stage.FILTERED, "stale")
            return Leave(group.key)
        if group.restarts >= self.rules.max_attempts:
            self._close(group.key, Stage.ABANDONED, "stale")
            return Leave(group.key)
        group.stage, group.step = Stage.SELECTING, None
        self._blocked_since.pop(group.key, None)
        return Restart(group.key)

    def _open(self, key: Key) -> Group:
        group = self.groups.get(key)
        if group is None or group.stage is Stage.PUSHED:
            raise ValueError(f"{key} is not open")
        return group

    def _close(self, key: Key, stage: Stage, reason: str) -> None:
        self._open(key)
        self._forget(key)
        self.terminal[key] = (stage, reason)

    def _forget(self, key: Key) -> None:
        del self.groups[key]
        self._line = None
        self._blocked_since.pop(key, None)


def _age(group: Group) -> tuple[int, int]:
    """Oldest policy first, then first come, first served."""
    return (group.step if group.step is not None else 1 << 62, group.order)
