"""The trainer's entry point, called in every rank."""

from __future__ import annotations

import logging
import os
import sys
import warnings

from protocol.config import ModelConfig, RunConfig
from protocol.errors import AddressError, ProtocolError
from protocol.messages import Version
from protocol.process import announce, die_with_parent
from trainer.config import TrainerConfig
from trainer.model_path import ModelError, check_model_path

log = logging.getLogger("trainer")


def main(config: TrainerConfig, model: ModelConfig, run: RunConfig, orchestrator_address: str) -> int:
    """Train until `finish` or SIGTERM; 0 then, else 1 after one line on stderr that names the place.

    Rank 0 serves `config.address`. The other ranks follow it; all end when one does (torchrun sees to that).
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        check_model_path(model.path)
        _run(config, model, run, orchestrator_address)
    except (ModelError, AddressError, ProtocolError, OSError, TimeoutError) as error:
        print(f"trainer: {error}", file=sys.stderr, flush=True)
        log.debug("trainer ended", exc_info=True)
        return 1
    return 0


def _run(config: TrainerConfig, model: ModelConfig, run: RunConfig, orchestrator_address: str) -> None:
    from trainer.desk import Desk
    from trainer.incarnation import raise_incarnation
    from trainer.intake import Bounds
    from trainer.loop import run_loop
    from trainer.policy import Policy
    from trainer.ranks import Ranks
    from trainer.signals import on_stop_signal
    from trainer.transports import transport_of

    leads = int(os.environ.get("RANK", "0")) == 0
    transport = transport_of(config.publish, run.folder / "weights")
    desk: Desk | None = None
    version = Version(0, 0)
    if leads:
        lineage = raise_incarnation(run.folder / "trainer" / "incarnation.json", branch_step=0)
        version = Version(lineage.incarnation, lineage.branch_step)
        desk = Desk(config, run, lineage, transport, orchestrator_address)
    on_stop_signal(desk.request_stop if desk else lambda: None, force_after_s=config.deadlines.stop_s)
    ranks: Ranks | None = None
    try:
        if desk:
            desk.start()
        ranks = Ranks.start(config.deadlines.collective_s)
        policy = Policy(config, model, run, ranks, transport)
        if desk:
            desk.open(
                Bounds(
                    max_staleness=run.max_staleness,
                    max_queued=max(config.max_queued_batches, run.max_staleness + 1),
                    total_steps=run.steps,
                    vocab=policy.causal.config.get_text_config().vocab_size,
                    context_tokens=policy.causal.config.get_text_config().max_position_embeddings,
                )
            )
            announce("trainer", desk.address)
        run_loop(policy, ranks, desk, config, run.steps, version)
    except Exception as error:
        if desk:
            desk.fail(error)
        raise
    finally:
        if desk:
            desk.close()
        if ranks:
            ranks.close()
