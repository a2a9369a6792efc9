"""What the supervisor promises: the dead are named, everything ends within seconds, nobody is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launch.process_tree import descendants

PROGRAM = Path(__file__).with_name("supervise_fakes.py")
PATIENCE_S = 20.0

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[subprocess.Popen[str]] = []

    def begin(*specs: str, start_s: float = 15.0, stop_s: float = 5.0) -> subprocess.Popen[str]:
        command = [sys.executable, str(PROGRAM), str(tmp_path), str(start_s), str(stop_s), *specs]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def wait_for_lines(process: subprocess.Popen[str], count: int) -> None:
    """Wait until `count` services have been reported ready."""
    assert process.stdout
    while count:
        line = process.stdout.readline()
        assert line, "the supervisor ended early"
        count -= line.startswith("ready ")


def wait_gone(pids: list[int]) -> None:
    """Wait until none of these processes lives (a zombie that nobody has reaped yet does not live)."""
    end = time.monotonic() + PATIENCE_S
    while left := [pid for pid in pids if _lives(pid)]:
        assert time.monotonic() < end, f"still alive: {left}"
        time.sleep(0.02)


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_dead_child_is_named_with_its_code_and_last_lines_and_the_rest_is_stopped(
    start: Start, tmp_path: Path
) -> None:
    process = start("orchestrator=waits", "verifier=dies")
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1
    assert "verifier ended with code 7" in err
    assert "fatal: the disk is on fire" in err
    assert "fatal: the disk is on fire" in (tmp_path / "verifier.log").read_text()
    assert "a line on stdout" not in out, "only the leader speaks to the terminal"


def test_the_leaders_lines_reach_the_terminal_and_its_end_is_success(start: Start) -> None:
    process = start("orchestrator=leader", "verifier=waits")
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, err
    assert "step 1/1  live line\n" in out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_everything_within_seconds(start: Start, number: signal.Signals) -> None:
    process = start("orchestrator=waits", "verifier=parent")
    wait_for_lines(process, 2)
    pids = descendants(process.pid)
    assert len(pids) == 3
    began = time.monotonic()
    process.send_signal(number)
    process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 128 + number
    assert time.monotonic() - began < 5.0
    wait_gone(pids)


def test_who_ignores_sigterm_is_killed(start: Start) -> None:
    process = start("orchestrator=stubborn", "verifier=waits", stop_s=0.5)
    wait_for_lines(process, 2)
    pids = descendants(process.pid)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=PATIENCE_S)
    wait_gone(pids)


def test_a_second_ctrl_c_ends_the_patience(start: Start) -> None:
    process = start("orchestrator=stubborn", stop_s=60.0)
    wait_for_lines(process, 1)
    pids = descendants(process.pid)
    process.send_signal(signal.SIGINT)
    wait_end = time.monotonic() + PATIENCE_S
    while process.poll() is None and time.monotonic() < wait_end:
        process.send_signal(signal.SIGINT)  # two signals that arrive as one count as one
        time.sleep(0.05)
    assert process.returncode == 128 + signal.SIGINT
    wait_gone(pids)


def test_kill_9_of_the_supervisor_leaves_no_process(start: Start) -> None:
    process = start("orchestrator=waits", "verifier=stubborn", "trainer=waits")
    wait_for_lines(process, 3)
    pids = descendants(process.pid)
    assert len(pids) == 3
    os.kill(process.pid, signal.SIGKILL)
    wait_gone(pids)


def test_a_service_killed_by_a_signal_is_named_with_it(start: Start) -> None:
    process = start("orchestrator=waits", "verifier=waits")
    wait_for_lines(process, 2)
    os.kill(descendants(process.pid)[0], signal.SIGKILL)
    _, err = process.communicate(timeout=PATIENCE_S)
    assert "was killed by SIGKILL" in err


def test_who_is_not_ready_in_time_is_named(start: Start) -> None:
    process = start("orchestrator=waits", "verifier=never-ready", start_s=3.0)
    _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1
    assert "not ready within 3 s: verifier" in err


def test_a_log_that_cannot_be_written_is_one_line(start: Start, tmp_path: Path) -> None:
    (tmp_path / "verifier.log").symlink_to("/dev/full")  # a disk without space
    process = start("orchestrator=waits", "verifier=dies")
    _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1
    assert err.strip().splitlines() == ["verifier: No space left on device"]
