"""Makes the model that the arithmetic example starts from: a small Qwen3, fine-tuned on imperfect worked solutions.

Like a base model that has read people of all habits, it learns from solutions that show every step, some steps, or
none, and a few that forget the box; it is not trained to the end either. So at temperature 1 six in ten of its answers
are right, and there is something to find out: that showing the work pays, and how not to slip.

A third of the batches are refinement prompts (the `paper` template) that hold drafts sampled from the model itself
while it learns, wrong ones more often than not. The solution to learn is worked out anew whatever the draft says.

    python warm_start.py --out DIR [--seed 0]     writes the model and its tokenizer, prints its accuracy
"""

import argparse
import json
import random
import re
import time
from collections import deque
from pathlib import Path
from typing import Any, cast

import problems
import torch
from problems import Problem
from tokenizer import ASSISTANT, END, USER, build_tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

SHOWN_STEPS = {1.0: 0.45, 0.5: 0.25, 0.0: 0.3}
"""Chance that an intermediate step is written down, and the share of solutions with that habit."""

UNBOXED_SHARE = 0.02
"""Share of solutions that end without the box."""

RIGHT_DRAFT_KEPT = 0.3
"""Share of right drafts that are put into refinement prompts; wrong ones all are."""

DRAFT_PREFIX, DRAFT_SUFFIX = "\n\n[Prior draft]\n", "\n"
"""What stands around the draft in the user's turn: the delimiters of the `paper` template."""

MAX_NEW_TOKENS = 64

ROW_LENGTH = 192
"""Tokens in a row of a training batch; the longest refinement prompt with its solution is shorter."""

BOXED = re.compile(r"\\boxed\{(-?\d+)\}$")


def new_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """An untrained float32 Qwen3 of about 0.8 million parameters with tied embeddings."""
    config = Qwen3Config(
        vocab_size=320,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=cast(int, tokenizer.eos_token_id),
        pad_token_id=cast(int, tokenizer.pad_token_id),
        dtype="float32",
    )
    return Qwen3ForCausalLM(config)


def demonstration(problem: Problem, rng: random.Random) -> str:
    """A solution as somebody might write it: always right, not always complete."""
    shown = rng.choices(list(SHOWN_STEPS), list(SHOWN_STEPS.values()))[0]
    *steps, last = problems.working(problem)
    steps = [step for step in steps if rng.random() < shown]
    if rng.random() < UNBOXED_SHARE:
        return "=".join([*steps, last])
    return problems.solution([*steps, last])


def prompt_text(problem: Problem, draft: str | None = None) -> str:
    """The whole prompt, as the chat template and the `paper` refinement template write it."""
    content = problems.prompt(problem)
    if draft is not None:
        content += DRAFT_PREFIX + draft + DRAFT_SUFFIX
    return USER + content + END + ASSISTANT


def grade(response: str, problem: Problem) -> float | None:
    """1 right, 0 wrong, None without a boxed number at the end. The run itself is graded by math-verify."""
    found = BOXED.search(response)
    return None if found is None else float(int(found[1]) == problems.answer(problem))


@torch.no_grad()
def respond(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[str], temperature: float = 1.0
) -> list[str]:
    """One response per prompt; temperature 0 is greedy."""
    tokenizer.padding_side = "left"
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    output = cast(Any, model).generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, **sampling)
    return tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def packed(tokenizer: PreTrainedTokenizerFast, rows: list[tuple[str, str]]) -> dict[str, Tensor]:
    """Model inputs [B, ROW_LENGTH] that hold prompts with their solutions one after another.

    Positions begin at 0 with each pair, by which transformers knows that pairs must not see each other. Labels are
    -100 on prompts and padding.
    """
    lines: list[list[tuple[int, int, int]]] = []
    for prompt, solution in rows:
        prompt_ids, solution_ids = tokenizer.encode(prompt), tokenizer.encode(solution + END)
        labels = [-100] * len(prompt_ids) + solution_ids
        pair = list(zip(prompt_ids + solution_ids, labels, range(len(labels)), strict=True))
        line = next((line for line in lines if len(line) + len(pair) <= ROW_LENGTH), None)
        if line is None:
            lines.append(pair)
        else:
            line.extend(pair)
    pad_id = tokenizer.pad_token_id
    full = [line + [(pad_id, -100, place) for place in range(ROW_LENGTH - len(line))] for line in lines]
    ids, labels, positions = torch.tensor(full).unbind(-1)
    return {"input_ids": ids, "labels": labels, "position_ids": positions}


def report(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, count: int = 1024) -> dict[str, float]:
    """Single-shot accuracy on held-out problems, at temperature 1 and greedy, and the share that parses."""
    heldout = problems.distinct("heldout", count, random.Random("heldout"))
    prompts = [prompt_text(problem) for problem in heldout]
    sampled = [grade(text, p) for text, p in zip(respond(model, tokenizer, prompts), heldout, strict=True)]
    greedy = [grade(text, p) for text, p in zip(respond(model, tokenizer, prompts, 0.0), heldout, strict=True)]
    return {
        "accuracy": sum(score or 0.0 for score in sampled) / count,
        "greedy_accuracy": sum(score or 0.0 for score in greedy) / count,
        "parsed": sum(score is not None for score in sampled) / count,
    }


def draft_some(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, batch: list[Problem], rng: random.Random
) -> list[tuple[Problem, str]]:
    """The model's own drafts for a batch: every wrong one, and some of the right ones."""
    drafts = respond(model, tokenizer, [prompt_text(problem) for problem in batch])
    return [
        (problem, draft)
        for problem, draft in zip(batch, drafts, strict=True)
        if draft.isascii() and (not grade(draft, problem) or rng.random() < RIGHT_DRAFT_KEPT)
    ]


def new_optimizers(model: Qwen3ForCausalLM, peak_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices, which learns this task in far fewer steps than AdamW does, and AdamW for the rest."""
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.dim() != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=peak_lr, weight_decay=0.0),
        torch.optim.AdamW(others, lr=peak_lr / 5, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def train(steps: int, batch_size: int, peak_lr: float, seed: int) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]:
    """Fine-tune a new model on plain prompts and, once it can write drafts, on refinement prompts."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    tokenizer = build_tokenizer()
    model = new_model(tokenizer)
    stream = problems.problems("warm_start", rng)
    optimizers = new_optimizers(model, peak_lr)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 1.25 * (1 - step / steps)))
        for optimizer in optimizers
    ]
    drafted: deque[tuple[Problem, str]] = deque(maxlen=1024)
    started = time.monotonic()
    for step in range(steps):
        if step >= steps // 4 and step % 100 == 0:
            drafted.extend(draft_some(model, tokenizer, [next(stream) for _ in range(256)], rng))
        if drafted and step % 3 == 0:
            pairs = [rng.choice(drafted) for _ in range(batch_size)]
            rows = [(prompt_text(problem, draft), demonstration(problem, rng)) for problem, draft in pairs]
        else:
            batch = [next(stream) for _ in range(batch_size)]
            rows = [(prompt_text(problem), demonstration(problem, rng)) for problem in batch]
        loss = model(**packed(tokenizer, rows), use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if step % 100 == 0:
            print(f"step {step}  loss {loss.item():.3f}  {time.monotonic() - started:.0f} s", flush=True)
    return model.eval(), tokenizer


def main() -> None:
    """Train, save and report."""
    parser = argparse.ArgumentParser(description="Warm-start the arithmetic example's model.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model and its tokenizer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1400, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=64, help="solutions per step")
    parser.add_argument("--lr", type=float, default=0.02, help="peak learning rate of the matrices")
    args = parser.parse_args()
    model, tokenizer = train(args.steps, args.batch_size, args.lr, args.seed)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(json.dumps(report(model, tokenizer)))


if __name__ == "__main__":
    main()
