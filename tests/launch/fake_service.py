"""A stand-in for a service: announces itself, then behaves as told. Run as a program."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from launch.supervisor import SUPERVISOR_VARIABLE
from protocol.process import announce, die_with_parent


def main(behaviour: str) -> int:
    die_with_parent(int(os.environ[SUPERVISOR_VARIABLE]))
    if behaviour == "dies":
        announce("fake", "ipc:///nowhere")
        print("a line on stdout", flush=True)
        print("fatal: the disk is on fire", file=sys.stderr, flush=True)
        return 7
    if behaviour == "never-ready":
        time.sleep(60)
    if behaviour == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    if behaviour == "parent":  # a worker in a session of its own, which also ignores SIGTERM
        ignoring = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
        subprocess.Popen([sys.executable, "-c", ignoring], start_new_session=True)
    announce("fake", "ipc:///nowhere")
    if behaviour == "leader":
        print("step 1/1  live line", flush=True)
        return 0
    time.sleep(60)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
