"""Environment variables that must be set before torch, SGLang or DeepSpeed are imported."""

from __future__ import annotations

import os
from pathlib import Path

from launch.config import Config
from launch.validate import is_local


def has_gpu() -> bool:
    """Whether this process may use an NVIDIA GPU; asked without importing torch."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()


def settings(config: Config) -> dict[str, str]:
    """Defaults for a service of this configuration; what the user has set already wins."""
    values = {"TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    if not has_gpu():
        # One thread: on small models two are far slower, and the services share the cores anyway.
        values |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    if not has_gpu() or config.rollout_server.device == "cpu":
        values["SGLANG_USE_CPU_ENGINE"] = "1"
    data = config.orchestrator.data if config.orchestrator else None
    remote = [source for source in ((data.train, data.heldout) if data else ()) if source and not is_local(source)]
    if config.model and Path(config.model.path).is_dir() and not remote:
        values["HF_HUB_OFFLINE"] = "1"
    return {name: value for name, value in values.items() if name not in os.environ}
