"""Runs a Supervisor over fake services, of which the first leads.

supervise_fakes.py LOG_DIR START_S STOP_S NAME=BEHAVIOUR…
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from launch.child import Service
from launch.supervisor import Outcome, Supervisor

FAKE = Path(__file__).with_name("fake_service.py")


async def run(logs: str, start_s: str, stop_s: str, specs: list[str]) -> Outcome:
    chosen = [Service(name, [sys.executable, str(FAKE), how]) for name, _, how in (s.partition("=") for s in specs)]
    supervisor = Supervisor(
        chosen,
        Path(logs),
        leader=chosen[0].name,
        may_end=frozenset({"trainer"}),
        start_s=float(start_s),
        stop_s=float(stop_s),
        say=lambda line: print(line, flush=True),
    )
    return await supervisor.run()


if __name__ == "__main__":
    outcome = asyncio.run(run(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:]))
    print(outcome.failure, file=sys.stderr)
    sys.exit(outcome.exit_code)
