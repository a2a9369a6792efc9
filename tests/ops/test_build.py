"""Building on demand: whatever goes wrong, the ops still work, after one warning and before the deadline."""

from __future__ import annotations

import fcntl
import logging
import os
import select
from pathlib import Path

import pytest
import torch

from ops import build
from ops.token_logprob import token_logprob


def test_falls_back_with_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "ops"):
        for _ in range(3):
            assert not build.load_kernels(1.0, tmp_path / "none", "no-such-compiler")
    assert [record.message for record in caplog.records] == [
        "C++ ops are not available, plain PyTorch is used instead: no C++ compiler: no-such-compiler is not on PATH"
    ]
    logp, _ = token_logprob(torch.zeros(2, 4), torch.tensor([0, 3]))
    assert torch.allclose(logp, torch.full((2,), 0.25).log())


def test_a_held_lock_is_waited_for_until_the_deadline(tmp_path: Path) -> None:
    library = tmp_path / f"token_logprob-{build._key()}.so"
    with library.with_suffix(".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(build.BuildError, match="did not finish before the deadline"):
            build.build(0.2, tmp_path, "c++")


def test_a_lock_left_by_a_dead_process_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / f"token_logprob-{build._key()}.so"
    library.with_suffix(".lock").write_text("left behind")
    monkeypatch.setattr(build, "_compile", lambda compiler, library, deadline: library.write_bytes(b"made"))
    assert build.build(5.0, tmp_path, "c++").read_bytes() == b"made"


def test_what_the_compiler_started_ends_with_it(tmp_path: Path) -> None:
    """The child inherits the fifo: it reads as ended only when nobody holds it any more."""
    driver, fifo = tmp_path / "driver", tmp_path / "fifo"
    os.mkfifo(fifo)
    driver.write_text(f"#!/bin/sh\nexec 3>{fifo}\nsleep 30 &\nwait\n")
    driver.chmod(0o755)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        with pytest.raises(build.BuildError, match="longer than the deadline"):
            build.build(1.0, tmp_path / "cache", str(driver))
        assert select.select([reader], [], [], 5.0)[0] and os.read(reader, 1) == b""
    finally:
        os.close(reader)


def test_a_build_that_hangs_or_fails_leaves_nothing(tmp_path: Path) -> None:
    slow, wrong = tmp_path / "slow", tmp_path / "wrong"
    slow.write_text("#!/bin/sh\nexec sleep 30\n")
    wrong.write_text("#!/bin/sh\necho 'x.cpp:1: error: no' >&2; exit 1\n")
    for compiler in (slow, wrong):
        compiler.chmod(0o755)
    cache = tmp_path / "cache"
    with pytest.raises(build.BuildError, match="longer than the deadline"):
        build.build(0.3, cache, str(slow))
    with pytest.raises(build.BuildError, match=r"x\.cpp:1: error: no"):
        build.build(5.0, cache, str(wrong))
    assert [path.suffix for path in cache.iterdir()] == [".lock"]
