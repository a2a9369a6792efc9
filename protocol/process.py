"""What every service process does: die with its parent, say that it is ready, end on a signal."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import sys

from protocol.server import Server

PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int | None = None) -> None:
    """Have the kernel kill this process (SIGKILL) when the thread that started it ends. Linux; elsewhere nothing.

    A parent that ends during the call is noticed too; so is one that ended before it, if its process id is given.
    """
    if not sys.platform.startswith("linux"):
        return
    expected = os.getppid() if parent is None else parent
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != expected:
        os.kill(os.getpid(), signal.SIGKILL)


def announce(service: str, address: str) -> None:
    """Print `ready <service> <address>`: whoever started this process waits for that line."""
    print(f"ready {service} {address}", flush=True)


async def stop_signal() -> signal.Signals:
    """Wait for SIGTERM or SIGINT and return it. A second one acts as it did before the call."""
    loop = asyncio.get_running_loop()
    stopped: asyncio.Future[signal.Signals] = loop.create_future()

    def stop(number: signal.Signals) -> None:
        if not stopped.done():
            stopped.set_result(number)

    numbers = (signal.SIGTERM, signal.SIGINT)
    for number in numbers:
        loop.add_signal_handler(number, stop, number)
    try:
        return await stopped
    finally:
        for number in numbers:
            with contextlib.suppress(ValueError, RuntimeError):
                loop.remove_signal_handler(number)


async def serve_until_signal(server: Server, *, drain_s: float) -> signal.Signals:
    """Serve until SIGTERM or SIGINT, let running work end within `drain_s`, close the server; returns the signal."""
    try:
        return await stop_signal()
    finally:
        await server.close(drain_s)
