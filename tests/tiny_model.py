"""A tiny random Qwen3 with a byte-level tokenizer and a ChatML template, written in well under a second.

Made with NumPy and `tokenizers` alone, so that tests that never import torch can have one too.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

PAD, IM_START, IM_END, THINK = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>"
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_CORPUS = (
    "What is 12 + 7 * 3 ? The answer is \\boxed{33}.\n\n[Prior draft]\nStep 1: 7 * 3 = 21. Step 2: 12 + 21 = 33.\n",
    "Your answer above is a draft. Use it to give a strictly improved answer: fix mistakes.\n\n0 1 2 3 4 5 6 7 8 9\n",
    "user\nassistant\nsystem\nYou are a helpful AI Assistant that provides well-reasoned and detailed responses.\n",
)


def make_tokenizer() -> Tokenizer:
    """Byte-level BPE of 320 entries: three control tokens, one ordinary added token, 256 bytes, a few merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=319,
        special_tokens=[PAD, IM_START, IM_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS * 4, trainer)
    tokenizer.add_tokens([THINK])
    return tokenizer


def make_tiny_model(
    folder: Path | str,
    *,
    seed: int = 0,
    dtype: str = "float32",
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    context: int = 2048,
    scale: float = 0.08,
) -> Path:
    """Write config, tokenizer and random weights to `folder` (made if needed). Same arguments, same bytes."""
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    vocab, head_dim, kv_heads, inner = 320, hidden // heads, max(1, heads // 2), hidden * 3
    write_tokenizer(out, tokenizer, context)
    config = {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "torch_dtype": dtype, "vocab_size": vocab,
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": head_dim, "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0, "max_position_embeddings": context, "tie_word_embeddings": True,
        "attention_bias": False, "attention_dropout": 0.0, "use_sliding_window": False, "use_cache": True,
        "initializer_range": 0.02, "bos_token_id": tokenizer.token_to_id(PAD),
        "eos_token_id": tokenizer.token_to_id(IM_END), "pad_token_id": tokenizer.token_to_id(PAD),
    }  # fmt: skip
    (out / "config.json").write_text(json.dumps(config, indent=1))
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (out / "generation_config.json").write_text(json.dumps(ids))
    rng = np.random.default_rng(seed)

    def matrix(rows: int, cols: int) -> np.ndarray:
        return (rng.standard_normal((rows, cols)) * scale).astype(np.float32)

    def ones(size: int) -> np.ndarray:
        return np.ones(size, np.float32)

    weights = {"model.embed_tokens.weight": matrix(vocab, hidden), "model.norm.weight": ones(hidden)}
    for n in range(layers):
        at = f"model.layers.{n}."
        weights |= {
            at + "input_layernorm.weight": ones(hidden),
            at + "post_attention_layernorm.weight": ones(hidden),
            at + "self_attn.q_norm.weight": ones(head_dim),
            at + "self_attn.k_norm.weight": ones(head_dim),
            at + "self_attn.q_proj.weight": matrix(heads * head_dim, hidden),
            at + "self_attn.k_proj.weight": matrix(kv_heads * head_dim, hidden),
            at + "self_attn.v_proj.weight": matrix(kv_heads * head_dim, hidden),
            at + "self_attn.o_proj.weight": matrix(hidden, heads * head_dim),
            at + "mlp.gate_proj.weight": matrix(inner, hidden),
            at + "mlp.up_proj.weight": matrix(inner, hidden),
            at + "mlp.down_proj.weight": matrix(hidden, inner),
        }
    if dtype == "bfloat16":
        _save_bfloat16(weights, out / "model.safetensors")
    else:
        save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    return out


def write_tokenizer(out: Path, tokenizer: Tokenizer, context: int) -> None:
    """tokenizer.json, tokenizer_config.json and the chat template, as transformers reads them."""
    tokenizer.save(str(out / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "pad_token": PAD, "eos_token": IM_END, "bos_token": PAD,
        "additional_special_tokens": [IM_START], "clean_up_tokenization_spaces": False, "model_max_length": context,
        "chat_template": CHAT_TEMPLATE,
    }  # fmt: skip
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))


def _save_bfloat16(weights: dict[str, np.ndarray], path: Path) -> None:
    """safetensors by hand: NumPy has no bfloat16, so the upper halves of rounded float32 words are written."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    blobs: list[bytes] = []
    offset = 0
    for name, array in weights.items():
        words = np.ascontiguousarray(array).view(np.uint32)
        blob = ((words + 0x7FFF + ((words >> 16) & 1)) >> 16).astype(np.uint16).tobytes()
        header[name] = {"dtype": "BF16", "shape": list(array.shape), "data_offsets": [offset, offset + len(blob)]}
        blobs.append(blob)
        offset += len(blob)
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + b"".join(blobs))


if __name__ == "__main__":
    import sys

    print(make_tiny_model(sys.argv[1]))
