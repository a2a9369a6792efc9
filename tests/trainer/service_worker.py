"""One rank of the trainer's service: `service_worker.py settings.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from protocol.config import ModelConfig, RunConfig
from trainer.config import TrainerConfig
from trainer.service import main

settings = json.loads(Path(sys.argv[1]).read_text())
sys.exit(
    main(
        TrainerConfig.model_validate(settings["trainer"]),
        ModelConfig.model_validate(settings["model"]),
        RunConfig.model_validate(settings["run"]),
        settings["orchestrator"],
    )
)
