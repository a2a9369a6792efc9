"""Configuration that more than one service needs, and the base of every service's own `config.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class StrictConfig(BaseModel):
    """Frozen; unknown keys are refused; each field's description becomes the reference page."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=False)


class RunConfig(StrictConfig):
    """Identity of a run. Shared by all services."""

    name: str = Field(
        default="run",
        min_length=1,
        max_length=128,
        pattern=r"^[A-Za-z0-9._-]+$",
        description="Name of the run; its folder is `dir`/`name`.",
    )
    dir: Path = Field(default=Path("runs"), description="Folder in which run folders are made.")
    seed: int = Field(default=0, ge=0, lt=2**31, description="Seed of data order, selection, initialisation and plots.")
    steps: int = Field(
        default=100,
        ge=1,
        description="Policy updates (batches) of the whole run; the learning-rate schedule spans them.",
    )
    max_staleness: int = Field(
        default=1,
        ge=0,
        le=64,
        description="Hard bound on lag: updates between a group's oldest token and its gradient; 0: synchronous.",
    )

    @property
    def folder(self) -> Path:
        """Where this run keeps logs, metrics, weights, exports and its summary."""
        return self.dir / self.name


class ModelConfig(StrictConfig):
    """The policy. Rollout servers and trainer load the same one."""

    path: str = Field(description="Folder or Hugging Face hub name of the model and its tokenizer.")
    dtype: Literal["float32", "bfloat16"] = Field(
        default="bfloat16", description="Type of the weights that are served and of the trainer's forward pass."
    )
    trust_remote_code: bool = Field(default=False, description="Let transformers run code that comes with the model.")


class EndpointConfig(StrictConfig):
    """Where a service listens. Each service's configuration inherits from this."""

    address: str = Field(
        default="auto",
        description="ZeroMQ address to listen on: `tcp://host:port`, `ipc:///path`, or `auto` (ipc).",
    )
    http_address: str = Field(default="", description="`host:port` for /healthz, /readyz and /metrics; empty: no HTTP.")
    insecure: bool = Field(
        default=False,
        description="Allow a plain tcp:// address that is not loopback (no encryption, no authentication).",
    )
