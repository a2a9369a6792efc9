"""Prompts as token ids, and q' = template(prompt, draft) spliced from token ids (DESIGN.md section 4).

INVARIANTS: the template's own parts are tokenized without sight of the draft, so their ids do not depend on it;
the draft's ids enter exactly as they were sampled, less one closing stop id; no other control id may enter with it.
`multi_turn`: Stage 1's prompt followed by the draft is, token for token, the beginning of Stage 2's prompt (unless the
draft was cut, or ended with a stop id other than the template's own end of turn, which takes its place).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from protocol.errors import InvalidError
from protocol.messages import ChatMessage
from rollout_server.config import Overflow, Template
from rollout_server.tokenizer import Tokenizer

_SENTINEL = "\ue000draft\ue001"
"""Stands for the draft while a template is rendered; private-use characters, which no template trims or escapes."""

_CACHED_QUESTIONS = 4096
"""Questions whose template parts are kept: each is asked for at least twice (draft, refine) and by N + G samples."""


@dataclass(frozen=True)
class TemplateSettings:
    """See RolloutServerConfig. draft_budget 0: no limit but the context."""

    kind: Template
    draft_prefix: str
    draft_suffix: str
    improve_request: str
    system_text: str
    overflow: Overflow
    draft_budget: int
    context_tokens: int


@dataclass(frozen=True)
class Parts:
    """Ids before and after the draft. `closing`: ids between the draft and `after` that end the assistant's turn."""

    before: tuple[int, ...]
    closing: tuple[int, ...]
    after: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.before) + len(self.closing) + len(self.after)


@dataclass(frozen=True)
class Spliced:
    """q' as int32 [T], and how many draft tokens did not fit."""

    ids: np.ndarray
    dropped: int


class Prompter:
    """Builds every prompt of one server. Raises InvalidError for what cannot be built; at construction too, where
    this model's chat template cannot carry a draft."""

    def __init__(self, tokenizer: Tokenizer, settings: TemplateSettings) -> None:
        self._tokenizer = tokenizer
        self._settings = settings
        self._cache: OrderedDict[tuple[bool, tuple[ChatMessage, ...]], Parts] = OrderedDict()
        probe = [ChatMessage(role="user", content="1 + 1 = ?")]
        answered = [*probe, ChatMessage(role="assistant", content=_SENTINEL)]
        tail = _split(tokenizer.render(answered, generate=False))[1]
        self.end_of_turn = next((i for i in tokenizer.encode(tail) if i in tokenizer.control_ids), None)
        self.stop_ids = tokenizer.stop_ids | ({self.end_of_turn} if self.end_of_turn is not None else set())
        """Ids that end a completion: those of the model, and the one that ends a turn in its chat template."""
        if not self.stop_ids:
            raise InvalidError("neither the model nor its chat template names an id that ends a completion")
        if settings.kind == "multi_turn" and self.end_of_turn is None:
            raise InvalidError("the chat template closes no assistant turn with a control id: use template `paper`")
        self._parts(probe)

    def prompt(self, messages: Sequence[ChatMessage]) -> np.ndarray:
        """Stage 1's prompt, int32 [T]: system message if one is set and none is there, then the generation prompt."""
        key = (False, tuple(messages))
        parts = self._cached(key)
        if parts is None:
            text = self._tokenizer.render(self._with_system(messages), generate=True)
            parts = self._keep(key, Parts(tuple(self._tokenizer.encode(text)), (), ()))
        return np.array(parts.before, np.int32)

    def checked(self, prompt_ids: np.ndarray) -> np.ndarray:
        """A prompt that came as ids: refused if empty or outside the vocabulary (which would kill a GPU engine)."""
        if prompt_ids.ndim != 1 or prompt_ids.dtype != np.int32 or prompt_ids.size == 0:
            raise InvalidError(f"prompt_ids must be int32 [T], not {prompt_ids.dtype} {list(prompt_ids.shape)}")
        if prompt_ids.min() < 0 or prompt_ids.max() >= self._tokenizer.vocab_size:
            raise InvalidError(f"prompt_ids holds ids outside the vocabulary of {self._tokenizer.vocab_size}")
        return prompt_ids

    def refine(
        self,
        messages: Sequence[ChatMessage] | None,
        prompt_ids: np.ndarray | None,
        draft_ids: np.ndarray,
        max_new_tokens: int,
    ) -> Spliced:
        """q' for a question given as messages or, with `multi_turn`, as the ids of Stage 1's prompt."""
        body = self._draft_body(draft_ids)
        if messages is not None:
            parts = self._parts(messages)
        elif prompt_ids is not None and self._settings.kind == "multi_turn":
            probe = self._parts([ChatMessage(role="user", content="1 + 1 = ?")])
            parts = Parts(tuple(self.checked(prompt_ids).tolist()), probe.closing, probe.after)
        else:
            raise InvalidError("template `paper` puts the draft inside the user's turn: send messages, not prompt_ids")
        kept = self._fit(body, len(parts), max_new_tokens)
        ids = np.concatenate([np.array(x, np.int32) for x in (parts.before, kept, parts.closing, parts.after)])
        return Spliced(ids, len(body) - len(kept))

    def _draft_body(self, draft_ids: np.ndarray) -> np.ndarray:
        if draft_ids.ndim != 1 or draft_ids.dtype != np.int32:
            raise InvalidError(f"draft_ids must be int32 [T], not {draft_ids.dtype} {list(draft_ids.shape)}")
        body = draft_ids[:-1] if draft_ids.size and int(draft_ids[-1]) in self.stop_ids else draft_ids
        if body.size and (body.min() < 0 or body.max() >= self._tokenizer.vocab_size):
            raise InvalidError(f"draft_ids holds ids outside the vocabulary of {self._tokenizer.vocab_size}")
        forbidden = self._tokenizer.control_ids | self.stop_ids
        for position, token in enumerate(body.tolist()):
            if token in forbidden:
                raise InvalidError(f"control id {token} inside the draft at position {position}")
        return body

    def _fit(self, body: np.ndarray, template_tokens: int, max_new_tokens: int) -> np.ndarray:
        """The draft, cut to its budget by the overflow rule."""
        context = self._settings.context_tokens
        room = context - template_tokens - max_new_tokens
        if room < 0:
            raise InvalidError(
                f"question and template ({template_tokens} tokens) and completion ({max_new_tokens}) "
                f"exceed the context of {context} tokens"
            )
        budget = min(room, self._settings.draft_budget or room)
        if len(body) <= budget:
            return body
        if self._settings.overflow == "reject":
            raise InvalidError(f"draft of {len(body)} tokens exceeds its budget of {budget}")
        return body[len(body) - budget :] if self._settings.overflow == "truncate_head" else body[:budget]

    def _parts(self, messages: Sequence[ChatMessage]) -> Parts:
        key = (True, tuple(messages))
        return self._cached(key) or self._keep(key, self._make_parts(self._with_system(messages)))

    def _make_parts(self, messages: list[ChatMessage]) -> Parts:
        if any(_SENTINEL in m.content for m in messages):
            raise InvalidError("a message contains the marker that stands for the draft")
        if self._settings.kind == "multi_turn":
            return self._multi_turn(messages)
        if messages[-1].role != "user":
            raise InvalidError("template `paper` needs the last message to be the user's")
        content = messages[-1].content + self._settings.draft_prefix + _SENTINEL + self._settings.draft_suffix
        rendered = self._tokenizer.render([*messages[:-1], ChatMessage(role="user", content=content)], generate=True)
        head, tail = _split(rendered)
        return Parts(tuple(self._tokenizer.encode(head)), (), tuple(self._tokenizer.encode(tail)))

    def _multi_turn(self, messages: list[ChatMessage]) -> Parts:
        turn = ChatMessage(role="assistant", content=_SENTINEL)
        request = ChatMessage(role="user", content=self._settings.improve_request)
        tail = self._tokenizer.encode(_split(self._tokenizer.render([*messages, turn, request], generate=True))[1])
        assert self.end_of_turn is not None
        if self.end_of_turn not in tail:
            raise InvalidError("the chat template does not close the draft's turn")
        after = tail[tail.index(self.end_of_turn) + 1 :]  # what stands before it is white space of the template
        before = self._tokenizer.encode(self._tokenizer.render(messages, generate=True))
        return Parts(tuple(before), (self.end_of_turn,), tuple(after))

    def _with_system(self, messages: Sequence[ChatMessage]) -> list[ChatMessage]:
        if not messages:
            raise InvalidError("messages is empty")
        if self._settings.system_text and messages[0].role != "system":
            return [ChatMessage(role="system", content=self._settings.system_text), *messages]
        return list(messages)

    def _cached(self, key: tuple[bool, tuple[ChatMessage, ...]]) -> Parts | None:
        if key in self._cache:
            self._cache.move_to_end(key)
        return self._cache.get(key)

    def _keep(self, key: tuple[bool, tuple[ChatMessage, ...]], parts: Parts) -> Parts:
        self._cache[key] = parts
        if len(self._cache) > _CACHED_QUESTIONS:
            self._cache.popitem(last=False)
        return parts


def _split(rendered: str) -> tuple[str, str]:
    if rendered.count(_SENTINEL) != 1:
        raise InvalidError("the chat template drops, repeats or changes the content of a message")
    head, tail = rendered.split(_SENTINEL)
    return head, tail
