"""`igrpo train CONFIG`: every service on this machine, from the first check to the plot."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.child import Service
from launch.config import Config, load
from launch.folder import claim, mark_failed_start, write_resolved
from launch.plan import plan, render
from launch.resolve import make_socket_folder, remove_socket_folder, resolve
from launch.supervisor import Outcome, Supervisor
from launch.validate import check_addresses, check_files, check_settings


def train(file: Path, overrides: Sequence[str], *, dry_run: bool) -> int:
    """Check, start, supervise. Raises LaunchError before anything is started or written."""
    config = resolve(load(file, overrides))
    check_settings(config)
    rows = check_files(config)
    if dry_run:
        say(render(plan(config, rows)))
        return 0
    check_addresses(config)
    claim(config.run)
    folder = config.run.folder
    resolved = folder / "resolved.yaml"
    try:
        make_socket_folder(config)
        write_resolved(config, resolved)
        outcome = supervise(services(config, resolved), config, leader="orchestrator", may_end=frozenset({"trainer"}))
    finally:
        remove_socket_folder(config)
        mark_failed_start(folder)
    if outcome.exit_code == 0:
        _plot(folder)
    return outcome.exit_code


def services(config: Config, resolved: Path) -> list[Service]:
    """The orchestrator first: the others say hello to it."""
    chosen = [service("orchestrator", resolved), service("verifier", resolved)]
    chosen.append(service("trainer", resolved, devices=config.launch.trainer_devices))
    for index in range(config.launch.replicas):
        devices = config.launch.replica_devices[index] if config.launch.replica_devices else ""
        name = "rollout-server" if config.launch.replicas == 1 else f"rollout-server-{index}"
        chosen.append(service("rollout-server", resolved, "--index", str(index), name=name, devices=devices))
    return chosen


def service(command: str, resolved: Path, *arguments: str, name: str = "", devices: str = "") -> Service:
    """A child that runs one command of this program. -P: the folder we are in must not shadow installed packages."""
    program = [sys.executable, "-P", "-m", "launch.cli", command, str(resolved), *arguments]
    return Service(name or command, program, {"CUDA_VISIBLE_DEVICES": devices} if devices else {})


def supervise(chosen: list[Service], config: Config, *, leader: str, may_end: frozenset[str] = frozenset()) -> Outcome:
    """Run the services to their end and tell people how it ended."""
    logs = config.run.folder / "logs"
    say(f"starting {', '.join(each.name for each in chosen)}; logs in {logs}")
    supervisor = Supervisor(
        chosen,
        logs,
        leader=leader,
        may_end=may_end,
        start_s=config.launch.start_s,
        stop_s=config.launch.stop_s,
        say=say,
    )
    outcome = asyncio.run(_run(supervisor))
    if outcome.failure:
        print(f"igrpo: {outcome.failure}", file=sys.stderr, flush=True)
    elif outcome.exit_code:
        print(f"igrpo: stopped by signal {outcome.exit_code - 128}", file=sys.stderr, flush=True)
    return outcome


async def _run(supervisor: Supervisor) -> Outcome:
    return await supervisor.run()


def say(line: str) -> None:
    """A line for the terminal."""
    print(line, flush=True)


def _plot(folder: Path) -> None:
    """The accuracy plot, where matplotlib is installed."""
    try:
        from launch.plot import plot_accuracy
    except ImportError:
        say("no plot: matplotlib is not installed")
        return
    say(f"plot: {plot_accuracy(folder)}")
