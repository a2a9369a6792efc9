"""What a configuration means in numbers: the text of `igrpo train --dry-run`."""

from __future__ import annotations

from launch.config import Config
from launch.resolve import reach, replica
from launch.validate import Rows, context_tokens, draft_tokens


def plan(config: Config, rows: Rows) -> dict[str, str]:
    """Derived quantities by name, in the order in which to print them."""
    model, orchestrator, trainer = config.need_model(), config.need_orchestrator(), config.trainer
    prompts, drafts, refinements = orchestrator.prompts_per_step, orchestrator.drafts, orchestrator.refinements
    refine_tokens = orchestrator.refine_sampling.max_new_tokens
    draft_max = orchestrator.draft_sampling.max_new_tokens if drafts else 0
    step_tokens = prompts * (drafts * draft_max + refinements * refine_tokens)
    window = (config.run.max_staleness + 1) * prompts
    lines = {
        "run folder": str(config.run.folder),
        "model": f"{model.path} ({model.dtype})",
        "algorithm": "plain GRPO" if not drafts else f"iGRPO, drafts chosen by {orchestrator.selection.rule.value}",
        "rollouts per step": (
            f"{prompts * (drafts + refinements)} = {prompts} prompts x ({drafts} drafts + {refinements} refinements), "
            f"{prompts * refinements} trained on"
        ),
        "generated tokens per step": f"at most {step_tokens:,}",
        "staleness": f"lag <= {config.run.max_staleness}; window of {window} prompts in flight",
        "training": (
            f"{config.run.steps} steps x {trainer.minibatches_per_step} update(s), {trainer.processes} process(es), "
            f"ZeRO-{trainer.deepspeed.zero_stage}, {trainer.tokens_per_microbatch:,} tokens per micro-batch"
        ),
        "steps per epoch": _epoch(config, rows),
        "context": _context(config),
        "weights": f"{trainer.publish.transport}, {trainer.publish.policy.value}",
    }
    heldout = orchestrator.evaluation.prompts or rows.heldout
    if orchestrator.data.heldout:
        count = "all" if heldout is None else min(heldout, rows.heldout) if rows.heldout is not None else heldout
        lines["evaluation"] = f"{count} held-out prompts x {orchestrator.evaluation.samples}, before and after"
    else:
        lines["evaluation"] = "none (orchestrator.data.heldout is empty)"
    lines["replicas"] = str(config.launch.replicas)
    for index in range(config.launch.replicas):
        settings = replica(config, index)
        lines[f"  {settings.name}"] = settings.address
    for section in ("orchestrator", "trainer", "verifier"):
        lines[f"  {section}"] = reach(config, section)
    return lines


def _epoch(config: Config, rows: Rows) -> str:
    orchestrator = config.need_orchestrator()
    if rows.train is None:
        return "known once the data set is loaded"
    steps = rows.train / orchestrator.prompts_per_step
    possible = int(steps * orchestrator.data.epochs)
    text = f"{steps:.4g} ({rows.train} prompts / {orchestrator.prompts_per_step}), {orchestrator.data.epochs} epoch(s)"
    if possible < config.run.steps:
        text += f"; the data end after about {possible} of {config.run.steps} steps"
    return text


def _context(config: Config) -> str:
    context = context_tokens(config)
    if context is None:
        return "as the model allows"
    orchestrator = config.need_orchestrator()
    room = context - orchestrator.refine_sampling.max_new_tokens
    if not orchestrator.drafts:
        return f"{context} tokens, of which {room} for the question"
    draft = draft_tokens(config, orchestrator)
    if draft is None:
        policy = config.rollout_server.draft_overflow
        return f"{context} tokens, of which {room} for question and draft (longer drafts: {policy})"
    return f"{context} tokens, of which {room - draft} for the question and {draft} for the draft"


def render(lines: dict[str, str]) -> str:
    """Aligned text."""
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines.items())
