"""The model's tokenizer as this server needs it: chat template, ids, text, and which ids are control ids."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from protocol.config import ModelConfig
from protocol.errors import InvalidError
from protocol.messages import ChatMessage


class Tokenizer(Protocol):
    """What templates.py asks of a tokenizer. `control_ids` never stand for text; `stop_ids` end a completion."""

    control_ids: frozenset[int]
    stop_ids: frozenset[int]
    vocab_size: int

    def render(self, messages: Sequence[ChatMessage], *, generate: bool) -> str: ...
    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Iterable[int]) -> str: ...


class ModelTokenizer:
    """Tokenizer of a Hugging Face model, and the two facts of its configuration that this server needs.

    Raises OSError or ValueError, in words of transformers, for a model that is not there or has no chat template.
    """

    def __init__(self, model: ModelConfig) -> None:
        from transformers import AutoConfig, AutoTokenizer  # slow to import, and only the server needs it

        trust = {"trust_remote_code": model.trust_remote_code}
        self._tokenizer: Any = AutoTokenizer.from_pretrained(model.path, **trust)
        config: Any = AutoConfig.from_pretrained(model.path, **trust).get_text_config()
        if not self._tokenizer.chat_template:
            raise ValueError(f"the tokenizer of {model.path} has no chat template")
        self.vocab_size: int = config.vocab_size
        self.tied_embeddings: bool = bool(config.tie_word_embeddings)
        added = self._tokenizer.added_tokens_decoder
        special = {i for i, token in added.items() if token.special}
        self.control_ids = frozenset(special | set(self._tokenizer.all_special_ids))
        self.stop_ids = frozenset(_stop_ids(model.path, config, self._tokenizer.eos_token_id))

    def render(self, messages: Sequence[ChatMessage], *, generate: bool) -> str:
        """The chat template's text. Raises InvalidError where the template refuses the conversation."""
        from jinja2 import TemplateError

        plain = [{"role": m.role, "content": m.content} for m in messages]
        try:
            return self._tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=generate)
        except TemplateError as error:
            raise InvalidError(f"chat template: {error}") from error

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: Iterable[int]) -> str:
        """Text for people and graders: control ids left out, bytes that are no UTF-8 replaced."""
        known = [i for i in ids if i < len(self._tokenizer)]
        return self._tokenizer.decode(known, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _stop_ids(path: str, config: Any, tokenizer_eos: int | None) -> set[int]:
    """End ids of generation_config.json, the model's and the tokenizer's configuration together."""
    found: set[int] = set()
    sources: list[Any] = [tokenizer_eos, getattr(config, "eos_token_id", None)]
    generation = Path(path) / "generation_config.json"
    if generation.is_file():
        sources.append(json.loads(generation.read_text()).get("eos_token_id"))
    for source in sources:
        if isinstance(source, int):
            found.add(source)
        elif source:
            found.update(source)
    return found
