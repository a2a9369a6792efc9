"""Starts that cannot succeed end with one line that names the place; a signal ends a start too."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import psutil
import pytest

from protocol.messages import PauseRequest
from protocol.server import Server
from rollout_server.config import RolloutServerConfig
from tests.rollout_server.serving import ServerProcess
from tests.tiny_model import make_tiny_model


def ends_with(server: ServerProcess, *words: str) -> None:
    """Exit code 1, and a last line on stderr with these words."""
    try:
        assert server.process.wait(120.0) == 1
    finally:
        server.end()
    last = server.log.read_text().strip().splitlines()[-1]
    assert last.startswith("rollout server r0: ")
    assert all(word in last for word in words), last


def test_a_missing_model_folder_is_named(tmp_path: Path) -> None:
    ends_with(ServerProcess(tmp_path, tmp_path / "nowhere"), str(tmp_path / "nowhere"), "no such folder")
    ends_with(ServerProcess(tmp_path, tmp_path), "no config.json")


async def test_an_address_in_use_is_named(tmp_path: Path) -> None:
    other = Server("other", "tcp://127.0.0.1:0")
    other.route("pause", PauseRequest, lambda *_: pytest.fail("nobody asks"))
    address = await other.start()
    try:
        server = ServerProcess(tmp_path, make_tiny_model(tmp_path / "m"), address=address)
        await asyncio.to_thread(ends_with, server, "address in use", address)
    finally:
        await other.close()


def test_a_signal_during_the_start_ends_everything(tmp_path: Path) -> None:
    server = ServerProcess(tmp_path, make_tiny_model(tmp_path / "m"))
    try:
        me = psutil.Process(server.process.pid)
        while not me.children():
            assert server.alive
        family = server.tree()
        assert server.stop() == 0
        _, left = psutil.wait_procs(family, 15.0)
        assert not left
    finally:
        server.end()


def test_damaged_weights_are_named(tmp_path: Path) -> None:
    weights = make_tiny_model(tmp_path / "m") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    ends_with(ServerProcess(tmp_path, tmp_path / "m"), str(weights), "damaged")


@pytest.mark.slow
def test_an_engine_that_does_not_start_says_why(tmp_path: Path) -> None:
    server = ServerProcess(tmp_path, make_tiny_model(tmp_path / "m"), context_tokens=4096)
    ends_with(server, "engine", "context")


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"capacity": 0}, "capacity"),
        ({"template": "papper"}, "template"),
        ({"context_tokens": 100, "draft_budget_tokens": 100}, "leaves no room"),
        ({"engine_args": {"weight_version": "x"}}, "weight_version"),
        ({"unknown": 1}, "unknown"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        RolloutServerConfig.model_validate(settings)
