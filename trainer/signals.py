"""SIGTERM and SIGINT, handled in a thread of their own: the main thread may be deep inside a collective."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable

STOPPING = (signal.SIGTERM, signal.SIGINT)


def on_stop_signal(stop: Callable[[], None], *, force_after_s: float) -> None:
    """Call `stop` at the first such signal; end the process at the second, or `force_after_s` later.

    Call it in the main thread before others start: they inherit the blocked signals.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    threading.Thread(target=_watch, args=(stop, force_after_s), name="signals", daemon=True).start()


def _watch(stop: Callable[[], None], force_after_s: float) -> None:
    number = signal.sigwait(STOPPING)
    stop()
    signal.sigtimedwait(STOPPING, force_after_s)
    os._exit(128 + number)
