"""One service in this process: the commands `igrpo verifier | rollout-server | orchestrator | trainer CONFIG`."""

from __future__ import annotations

import logging
import os
import socket
import sys

from launch.config import Config
from launch.environment import settings
from launch.resolve import make_socket_folder, reach, replica
from launch.supervisor import SUPERVISOR_VARIABLE
from launch.validate import check_model
from protocol.process import die_with_parent

SERVICES = ("orchestrator", "verifier", "trainer", "rollout-server")
"""Names of the commands, in the order in which `igrpo train` starts them."""


def run_service(
    service: str, config: Config, config_arguments: list[str], *, index: int = 0, alone: bool = False
) -> int:
    """Run until it ends. `config` is resolved; `config_arguments` are the words that describe it on a command line.

    index, alone: of a rollout server, its number and whether it registers with no orchestrator.
    """
    in_rank = "TORCHELASTIC_RUN_ID" in os.environ
    if (supervisor := os.environ.get(SUPERVISOR_VARIABLE)) and not in_rank:
        die_with_parent(int(supervisor))
    os.environ.update(settings(config))
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    make_socket_folder(config)
    match service:
        case "verifier":
            return _verifier(config)
        case "rollout-server":
            return _rollout_server(config, index, alone)
        case "orchestrator":
            return _orchestrator(config)
        case "trainer":
            if config.trainer.processes > 1 and not in_rank:
                _become_torchrun(config.trainer.processes, config_arguments)
            return _trainer(config)
    raise ValueError(f"unknown service {service}")


def _verifier(config: Config) -> int:
    from verifier.service import main

    return main(config.verifier, config.run)


def _rollout_server(config: Config, index: int, alone: bool) -> int:
    model = config.need_model()
    check_model("model.path", model.path)
    from rollout_server.service import main

    orchestrator = None if alone else reach(config, "orchestrator")
    return main(replica(config, index), model, config.run, orchestrator)


def _orchestrator(config: Config) -> int:
    orchestrator = config.need_orchestrator()
    from orchestrator.config import Addresses
    from orchestrator.service import main

    addresses = Addresses(trainer=reach(config, "trainer"), verifier=reach(config, "verifier"))
    return main(orchestrator, config.run, addresses)


def _trainer(config: Config) -> int:
    model = config.need_model()
    check_model("model.path", model.path)
    for name, value in _single_rank().items():
        os.environ.setdefault(name, value)
    from trainer.service import main

    return main(config.trainer, model, config.run, reach(config, "orchestrator"))


def _single_rank() -> dict[str, str]:
    """What torchrun would set for one process; without it DeepSpeed looks for MPI."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _become_torchrun(processes: int, config_arguments: list[str]) -> None:
    """Replace this process by torchrun, which starts this command per rank. `die_with_parent` survives the exec."""
    os.environ["PYTHONSAFEPATH"] = "1"  # its `python -m launch.cli` must find the installed package, not the folder's
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts", "0"]
    command = ["--nproc-per-node", str(processes), "-m", "launch.cli", "trainer", *config_arguments]
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, launcher + command)
