"""Compiles and loads the kernels in csrc/: on demand, cached by source and machine, with a deadline.

INVARIANTS: a compiled library appears in the cache whole (written aside, renamed). The lock is the kernel's (flock), so
it dies with its holder: no lock is ever stale. Whatever fails, the ops still run as plain torch, after one warning.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import logging
import os
import platform
import shutil
import signal
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

import ops.token_logprob  # noqa: F401  declares the ops for which the kernels are

log = logging.getLogger("ops")

SOURCE = Path(__file__).parent / "csrc" / "token_logprob_cpu.cpp"
FLAGS = ("-O3", "-march=native", "-std=c++20", "-fPIC", "-shared", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")


class BuildError(RuntimeError):
    """The kernels could not be built or loaded; the message says why in one line."""


@functools.cache
def load_kernels(deadline_s: float = 300.0, cache: Path | None = None, compiler: str | None = None) -> bool:
    """Build the kernels unless the cache has them, and load them. False: plain torch is used; a warning says why."""
    try:
        library = build(deadline_s, cache or default_cache(), compiler or os.environ.get("CXX") or "c++")
        torch.ops.load_library(str(library))
    except (BuildError, OSError) as error:
        log.warning("C++ ops are not available, plain PyTorch is used instead: %s", error)
        return False
    return True


def default_cache() -> Path:
    """$IGRPO_OPS_CACHE, else igrpo/ops in the user's cache folder."""
    if configured := os.environ.get("IGRPO_OPS_CACHE"):
        return Path(configured)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "igrpo" / "ops"


def build(deadline_s: float, cache: Path, compiler: str) -> Path:
    """The compiled library's path. Raises BuildError if there is no compiler, it fails, or the deadline passes."""
    deadline = time.monotonic() + deadline_s
    library = cache / f"token_logprob-{_key()}.so"
    if library.exists():
        return library
    if shutil.which(compiler) is None:
        raise BuildError(f"no C++ compiler: {compiler} is not on PATH")
    cache.mkdir(parents=True, exist_ok=True)
    with _lock(library.with_suffix(".lock"), deadline):
        if not library.exists():
            _compile(compiler, library, deadline)
    return library


def _compile(compiler: str, library: Path, deadline: float) -> None:
    root = Path(torch.__file__).parent
    includes = (root / "include", root / "include/torch/csrc/api/include", sysconfig.get_paths()["include"])
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / library.name
        command = [
            compiler,
            *FLAGS,
            f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
            *(f"-I{include}" for include in includes),
            str(SOURCE),
            f"-L{root / 'lib'}",
            "-lc10",
            "-ltorch_cpu",
            "-o",
            str(made),
        ]
        try:
            returncode, output = _run(command, max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired as error:
            raise BuildError(f"compiling {SOURCE.name} took longer than the deadline") from error
        if returncode:
            first = next((line for line in output.splitlines() if "error" in line), "no output")
            raise BuildError(f"{compiler} failed on {SOURCE.name}: {first}")
        made.replace(library)


def _run(command: list[str], timeout_s: float) -> tuple[int, str]:
    """Exit status and stderr. Whatever ends the wait early ends the driver and the compilers that it started."""
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            _, output = process.communicate(timeout=timeout_s)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return process.returncode, output


@contextlib.contextmanager
def _lock(path: Path, deadline: float) -> Iterator[None]:
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() >= deadline:
                    raise BuildError(f"another process holds {path} and did not finish before the deadline") from error
                time.sleep(0.1)
        yield


def _key() -> str:
    """Changes with source, flags, torch and CPU: -march=native code runs only where it was made for."""
    parts = [SOURCE.read_bytes().decode(), *FLAGS, torch.__version__, platform.machine()]
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        parts += [line for line in lines if line.startswith(("flags", "Features"))][:1]  # as x86 and Arm call them
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=8).hexdigest()
