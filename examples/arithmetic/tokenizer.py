"""The arithmetic example's tokenizer: bytes, two longer tokens, five control tokens, and a chat template.

Every text is a sequence of bytes, so encoding loses nothing. Control ids are meant to come from the chat template
alone: encode other people's text with `split_special_tokens=True`, and a control token spelled in it is plain bytes.
"""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, END, SYSTEM, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"

LONG_TOKENS = ("\\boxed{", "[Prior draft]")
"""Strings that every response or every refinement prompt contains: one token each keeps sequences short."""

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of 263 ids; `<|end|>` closes each turn and is the end-of-sequence token."""
    controls = (PAD, END, SYSTEM, USER, ASSISTANT)
    vocabulary = [*controls, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(vocabulary)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in controls])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in LONG_TOKENS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, clean_up_tokenization_spaces=False
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
