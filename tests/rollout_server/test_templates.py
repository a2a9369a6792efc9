"""q' is spliced from token ids: its parts never depend on the draft, and the draft's ids enter as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.config import ModelConfig
from protocol.errors import InvalidError
from protocol.messages import ChatMessage
from rollout_server.config import IMPROVE_REQUEST, PAPER_SYSTEM_PROMPT, RolloutServerConfig, Template
from rollout_server.templates import Prompter, TemplateSettings
from rollout_server.tokenizer import ModelTokenizer
from tests.tiny_model import make_tiny_model

CONTEXT = 4096
TEXT = st.text(st.characters(blacklist_categories=("Cs", "Co")), max_size=40).filter(lambda t: "<|" not in t)
ORDINARY = st.lists(
    st.integers(3, 319), max_size=60
)  # ids 0, 1, 2 are the tiny tokenizer's control ids; 319 is <think>
KINDS: list[Template] = ["paper", "multi_turn"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ModelTokenizer:
    folder = make_tiny_model(tmp_path_factory.mktemp("model"))
    return ModelTokenizer(ModelConfig.model_validate({"path": str(folder), "dtype": "float32"}))


def prompter(tokenizer: ModelTokenizer, kind: Template, **changes: Any) -> Prompter:
    defaults = RolloutServerConfig.model_validate({})
    fields: dict[str, Any] = {
        "kind": kind,
        "draft_prefix": defaults.draft_prefix,
        "draft_suffix": defaults.draft_suffix,
        "improve_request": IMPROVE_REQUEST,
        "system_text": "",
        "overflow": "truncate_head",
        "draft_budget": 0,
        "context_tokens": CONTEXT,
    }
    return Prompter(tokenizer, TemplateSettings(**fields | changes))


def ids(values: list[int]) -> np.ndarray:
    return np.array(values, np.int32)


def user(text: str) -> list[ChatMessage]:
    return [ChatMessage(role="user", content=text)]


@settings(deadline=None, max_examples=150)
@given(question=TEXT, draft=ORDINARY, complete=st.booleans(), system=st.sampled_from(["", PAPER_SYSTEM_PROMPT]))
def test_multi_turn_begins_with_stage_one_token_for_token(
    tokenizer: ModelTokenizer, question: str, draft: list[int], complete: bool, system: str
) -> None:
    build = prompter(tokenizer, "multi_turn", system_text=system)
    assert build.end_of_turn is not None
    sampled = [*draft, build.end_of_turn] if complete else draft
    stage_one = build.prompt(user(question)).tolist() + sampled
    refined = build.refine(user(question), None, ids(sampled), 64)
    assert refined.dropped == 0
    assert refined.ids.dtype == np.int32
    assert refined.ids[: len(stage_one)].tolist() == stage_one
    closed = stage_one if complete else [*stage_one, build.end_of_turn]
    after = f"\n<|im_start|>user\n{IMPROVE_REQUEST}<|im_end|>\n<|im_start|>assistant\n"
    assert refined.ids.tolist() == closed + tokenizer.encode(after)


@settings(deadline=None, max_examples=150)
@given(question=TEXT, one=ORDINARY, other=ORDINARY)
def test_paper_puts_the_draft_between_parts_that_do_not_depend_on_it(
    tokenizer: ModelTokenizer, question: str, one: list[int], other: list[int]
) -> None:
    build = prompter(tokenizer, "paper")
    head = tokenizer.encode(f"<|im_start|>user\n{question}\n\n[Prior draft]\n")
    tail = tokenizer.encode("\n<|im_end|>\n<|im_start|>assistant\n")
    for draft in (one, other, [*one, 2]):
        body = draft[:-1] if draft[-1:] == [2] else draft
        assert build.refine(user(question), None, ids(draft), 64).ids.tolist() == head + body + tail


@settings(deadline=None, max_examples=60)
@given(question=TEXT, draft=ORDINARY)
def test_prompt_ids_and_messages_give_the_same_refinement_prompt(
    tokenizer: ModelTokenizer, question: str, draft: list[int]
) -> None:
    build = prompter(tokenizer, "multi_turn", system_text="Be brief.")
    by_ids = build.refine(None, build.prompt(user(question)), ids(draft), 8)
    assert by_ids.ids.tolist() == build.refine(user(question), None, ids(draft), 8).ids.tolist()


@settings(deadline=None, max_examples=100)
@given(draft=ORDINARY, budget=st.integers(1, 40), kind=st.sampled_from(KINDS), end=st.sampled_from(["head", "tail"]))
def test_a_long_draft_loses_only_what_its_budget_demands(
    tokenizer: ModelTokenizer, draft: list[int], budget: int, kind: Template, end: str
) -> None:
    build = prompter(tokenizer, kind, overflow=f"truncate_{end}", draft_budget=budget)
    cut = build.refine(user("q"), None, ids(draft), 8)
    kept = draft[-budget:] if end == "head" else draft[:budget]
    assert cut.dropped == max(0, len(draft) - budget)
    assert cut.ids.tolist() == prompter(tokenizer, kind).refine(user("q"), None, ids(kept), 8).ids.tolist()


def test_the_context_bounds_the_draft_even_without_a_budget(tokenizer: ModelTokenizer) -> None:
    empty = len(prompter(tokenizer, "paper").refine(user("q"), None, ids([]), 8).ids)
    build = prompter(tokenizer, "paper", context_tokens=empty + 10 + 8)
    cut = build.refine(user("q"), None, ids([50] * 30), 8)
    assert (len(cut.ids) + 8, cut.dropped) == (empty + 10 + 8, 20)
    with pytest.raises(InvalidError, match=r"exceed the context"):
        build.refine(user("q"), None, ids([50]), 100)
    with pytest.raises(InvalidError, match="exceeds its budget of 10"):
        strict = prompter(tokenizer, "paper", overflow="reject", context_tokens=empty + 10 + 8)
        strict.refine(user("q"), None, ids([50] * 30), 8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("draft", [[50, 1, 60], [2, 50], [50, 2, 2], [50, 0, 60], [-1], [320]])
def test_control_ids_and_strangers_inside_a_draft_are_refused(
    tokenizer: ModelTokenizer, kind: Template, draft: list[int]
) -> None:
    with pytest.raises(InvalidError):
        prompter(tokenizer, kind).refine(user("q"), None, ids(draft), 8)


def test_added_tokens_that_are_text_may_stand_in_a_draft(tokenizer: ModelTokenizer) -> None:
    think = tokenizer.encode("<think>")
    assert think == [319]
    assert 319 in prompter(tokenizer, "paper").refine(user("q"), None, ids(think), 8).ids


def test_the_paper_preset_is_the_papers_instruction(tokenizer: ModelTokenizer) -> None:
    config = RolloutServerConfig.model_validate({"system_prompt": "paper"})
    assert config.system_text.startswith("You are a helpful AI Assistant that provides well-reasoned")
    assert config.system_text.endswith("correct it and proceed.")
    build = prompter(tokenizer, "paper", system_text=config.system_text)
    text = f"<|im_start|>system\n{config.system_text}<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    assert build.prompt(user("q")).tolist() == tokenizer.encode(text)
    own = [ChatMessage(role="system", content="mine"), *user("q")]
    assert build.prompt(own).tolist() == prompter(tokenizer, "paper").prompt(own).tolist()


def test_what_cannot_be_templated_is_invalid(tokenizer: ModelTokenizer) -> None:
    build = prompter(tokenizer, "paper")
    with pytest.raises(InvalidError, match="empty"):
        build.prompt([])
    with pytest.raises(InvalidError, match="send messages"):
        build.refine(None, ids([5, 6]), ids([7]), 8)
    with pytest.raises(InvalidError, match="last message"):
        build.refine([*user("q"), ChatMessage(role="assistant", content="a")], None, ids([7]), 8)
    for bad in (ids([]), ids([320]), ids([-1]), np.array([1], np.int64)):
        with pytest.raises(InvalidError):
            build.checked(bad)


def test_text_for_graders_has_no_control_tokens(tokenizer: ModelTokenizer) -> None:
    assert tokenizer.decode([*tokenizer.encode("\\boxed{33} é"), 2]) == "\\boxed{33} é"
    assert tokenizer.decode([100_000]) == ""  # an id of the padded embedding that no token has


def test_a_template_that_changes_content_is_named_at_the_start(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "m")
    config = folder / "tokenizer_config.json"
    config.write_text(config.read_text().replace("m['content']", "m['content'][:3]"))
    with pytest.raises(InvalidError, match="chat template"):
        prompter(ModelTokenizer(ModelConfig.model_validate({"path": str(folder), "dtype": "float32"})), "paper")
