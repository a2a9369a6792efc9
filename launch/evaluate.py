"""`igrpo eval CONFIG MODEL`: a model's single-shot accuracy on the held-out set, through the real services."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.config import Config, load
from launch.errors import ConfigError, LaunchError
from launch.folder import claim, mark_failed_start, write_resolved
from launch.resolve import make_socket_folder, reach, remove_socket_folder, resolve
from launch.supervisor import SUPERVISOR_VARIABLE
from launch.train import service, supervise
from launch.validate import check_model, count_rows
from protocol.process import announce, die_with_parent


def evaluate_model(file: Path, model: str, overrides: Sequence[str]) -> int:
    """Start a rollout server with `model` and a verifier, unless `addresses` names running ones, and measure.

    Logs and evaluation.json go into a run folder of their own, `<run.name>-eval-<n>`.
    """
    config = load(file, [*overrides, f"model.path={json.dumps(model)}"])
    data = config.need_orchestrator().data
    if not data.heldout:
        raise ConfigError("orchestrator.data.heldout is empty: there is nothing to evaluate on")
    check_model("MODEL", model)
    count_rows("orchestrator.data.heldout", data.heldout, config.need_orchestrator(), data.heldout_split)
    config = resolve(_own_folder(config))
    claim(config.run)
    resolved = config.run.folder / "resolved.yaml"
    try:
        make_socket_folder(config)
        write_resolved(config, resolved)
        children = [service("_measure", resolved, name="evaluation")]
        if not config.addresses.verifier:
            children.append(service("verifier", resolved))
        if not config.addresses.rollout_server:
            children.append(service("rollout-server", resolved, "--alone"))
        outcome = supervise(children, config, leader="evaluation")
    finally:
        remove_socket_folder(config)
        if not (config.run.folder / "evaluation.json").exists():
            mark_failed_start(config.run.folder)
    return outcome.exit_code


def _own_folder(config: Config) -> Config:
    """The same configuration under a name of its own, so that no training run's folder is touched."""
    number = 1
    while (config.run.dir / f"{config.run.name}-eval-{number}").exists():
        number += 1
    run = config.run.model_copy(update={"name": f"{config.run.name}-eval-{number}"})
    return config.model_copy(update={"run": run})


def measure(file: Path, overrides: Sequence[str]) -> int:
    """The leading child of `eval`: waits for the services, evaluates, prints and writes evaluation.json."""
    if supervisor := os.environ.get(SUPERVISOR_VARIABLE):
        die_with_parent(int(supervisor))
    config = resolve(load(file, overrides))
    announce("evaluation", "-")
    from protocol.errors import ProtocolError

    try:
        result = asyncio.run(_measure(config))
    except ProtocolError as error:
        print(f"evaluation: {error}", file=sys.stderr, flush=True)
        return 1
    target = config.run.folder / "evaluation.json"
    try:
        target.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise LaunchError(f"cannot write {target}: {error.strerror}") from None
    for name, value in result.items():
        print(f"{name:<20} {value}")
    print(f"written to {target}", flush=True)
    return 0


async def _measure(config: Config) -> dict[str, Any]:
    """All held-out prompts (or `evaluation.prompts` of them), `evaluation.samples` completions each."""
    from orchestrator.data import load_problems
    from orchestrator.dispatch import Dispatcher
    from orchestrator.evaluate import evaluate
    from orchestrator.grading import Grader
    from orchestrator.membership import Membership
    from orchestrator.replicas import ReplicaWatch
    from protocol.clients import RolloutClient, VerifierClient
    from protocol.messages import ReplicaHello

    settings = config.need_orchestrator()
    problems = load_problems(settings.data.heldout, settings.data, split=settings.data.heldout_split)
    problems = problems[: settings.evaluation.prompts or len(problems)]
    address = config.addresses.rollout_server or config.rollout_server.address
    dispatcher = Dispatcher(Membership(settings.deadlines.replica_silent_s), max_tries=settings.max_attempts + 2)
    async with contextlib.AsyncExitStack() as stack:
        verifier = VerifierClient(reach(config, "verifier"), name="evaluation", run=config.run.name)
        stack.push_async_callback(verifier.close)
        probe = RolloutClient(address, name="evaluation", run=config.run.name)
        stack.push_async_callback(probe.close)
        watch = ReplicaWatch(dispatcher, dispatcher.pump)
        stack.push_async_callback(watch.close)
        info = await _until_ready(probe, config.launch.start_s)
        dispatcher.incarnation = info.version.incarnation
        watch.hello(
            ReplicaHello(
                name=info.name, address=address, capacity=max(1, info.capacity), context_tokens=info.context_tokens
            )
        )
        grader = Grader(verifier, task=settings.data.task, timeout_s=settings.deadlines.verify_s)
        started = time.monotonic()
        found = await evaluate(
            problems,
            settings.evaluation,
            dispatcher,
            grader,
            fresh=lambda step: True,
            timeout_s=settings.deadlines.generate_s,
        )
        seconds = time.monotonic() - started
    k = settings.evaluation.samples
    values: dict[str, float] = {"pass@1": found.accuracy}
    if k > 1:
        values |= {f"avg@{k}": found.accuracy, f"pass@{k}": found.pass_at(k)}
    means = [value for value in found.prompt_means if value is not None]
    return {
        "model": config.need_model().path,
        "prompts": len(problems),
        "samples_per_prompt": k,
        **{name: _rounded(value) for name, value in values.items()},
        "standard_error": _rounded(_standard_error(means)),
        "ungraded_prompts": len(problems) - len(means),
        "statuses": dict(sorted(found.statuses.items())),
        "seconds": round(seconds, 1),
        "tokens_per_second": round(found.tokens / seconds, 1) if seconds else None,
    }


async def _until_ready(client: Any, patience_s: float) -> Any:
    """The rollout server's `info` once it takes work. Raises ProtocolError after `patience_s`."""
    from protocol.errors import DeadlineError, ProtocolError, UnavailableError

    end, known = time.monotonic() + patience_s, None
    while True:
        try:
            info = await client.info(known, 2000 if known is not None else 0, timeout_s=5.0)
            known = info.revision
            if info.state == "ready":
                return info
        except (DeadlineError, UnavailableError):
            known = None
        if time.monotonic() > end:
            raise ProtocolError(f"the rollout server was not ready within {patience_s:.0f} s")


def _standard_error(values: Sequence[float]) -> float:
    if len(values) < 2:
        return math.nan
    centre = sum(values) / len(values)
    return math.sqrt(sum((value - centre) ** 2 for value in values) / (len(values) - 1) / len(values))


def _rounded(value: float) -> float | None:
    return round(value, 5) if math.isfinite(value) else None
