"""`auto` and wildcard addresses made concrete, the same for every process that reads the same configuration."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from pathlib import Path

from launch.config import Config
from launch.errors import ConfigError
from rollout_server.config import RolloutServerConfig

MAX_SOCKET_PATH = 100
"""Longest socket path, below the 107 bytes that the system allows; run folders deeper than that get a short one."""

_WILDCARD = re.compile(r"^tcp://(\*|0\.0\.0\.0|\[::\]):")


def socket_folder(run_folder: Path) -> Path:
    """Where `auto` services of this run listen: inside the run folder, or a short folder named by its hash."""
    folder = run_folder.resolve() / "sock"
    longest = folder / "rollout-server-9999.sock"
    if len(os.fsencode(longest)) <= MAX_SOCKET_PATH:
        return folder
    digest = hashlib.sha256(os.fsencode(run_folder.resolve())).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"igrpo-{os.getuid()}-{digest}"


def make_socket_folder(config: Config) -> None:
    """Create the folder if an address lies in it; nobody else may enter it."""
    folder = socket_folder(config.run.folder)
    addresses = [getattr(config, name).address for name in ("rollout_server", "verifier", "trainer")]
    addresses += [config.orchestrator.address] if config.orchestrator else []
    if any(address.startswith(f"ipc://{folder}/") for address in addresses):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_uid != os.getuid():
            raise ConfigError(f"{folder}: the folder for sockets belongs to another user")


def remove_socket_folder(config: Config) -> None:
    """Remove the folder with what crashed services left in it."""
    shutil.rmtree(socket_folder(config.run.folder), ignore_errors=True)


def resolve(config: Config) -> Config:
    """The configuration with every `auto` address replaced. Idempotent."""
    folder = socket_folder(config.run.folder)
    changes = {}
    for section in ("rollout_server", "verifier", "orchestrator", "trainer"):
        settings = getattr(config, section)
        if settings is not None and settings.address == "auto":
            address = f"ipc://{folder}/{section.replace('_', '-')}.sock"
            changes[section] = settings.model_copy(update={"address": address})
    return config.model_copy(update=changes)


def replica(config: Config, index: int) -> RolloutServerConfig:
    """Settings of replica `index`: its own name, address (ipc: another file; tcp: port + index) and HTTP port."""
    settings = config.rollout_server
    if index == 0:
        return settings
    stem = re.sub(r"-\d+$", "", settings.name)
    address = settings.address
    if address.startswith("ipc://"):
        address = re.sub(r"(\.sock)?$", rf"-{index}\1", address, count=1)
    return settings.model_copy(
        update={
            "name": f"{stem}-{index}",
            "address": _next_port(address, index) if address.startswith("tcp://") else address,
            "http_address": _next_port(settings.http_address, index) if settings.http_address else "",
        }
    )


def _next_port(address: str, index: int) -> str:
    host, _, port = address.rpartition(":")
    return f"{host}:{int(port) + index}" if port.isdigit() and port != "0" else address


def reach(config: Config, section: str) -> str:
    """The address at which others reach the orchestrator, trainer or verifier."""
    elsewhere = getattr(config.addresses, section)
    if elsewhere:
        return elsewhere
    settings = getattr(config, section)
    if settings is None:
        raise ConfigError(f"nothing says where the {section} is: give {section}.address or addresses.{section}")
    address = settings.address
    if address.startswith("tcp://") and address.rpartition(":")[2] in ("0", "*"):
        raise ConfigError(f"{section}.address: {address} has no fixed port; others could not find the {section}")
    return _WILDCARD.sub("tcp://127.0.0.1:", address)
