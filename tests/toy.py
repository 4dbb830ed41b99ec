"""A small random checkpoint with every file that a real one has; its text is meaningless, its decoding is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sglang_llada.llada2.config import Llada2Config
from sglang_llada.llada2.reference import Llada2ForDiffusion

SPECIALS = ("<|endoftext|>", "<|mask|>", "<|role_end|>")
EOS, MASK, TURN_END = 256, 257, 258
VOCAB = 272

SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "moe_intermediate_size": 32,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "architectures": ["LLaDA2MoeModelLM"],
    "dtype": "float32",
    "mask_token_id": MASK,
    "eos_token_id": EOS,
    "pad_token_id": EOS,
}


def make_config(**overrides: Any) -> Llada2Config:
    """The toy's shape, with whatever a test wants otherwise."""
    return Llada2Config(**{**SHAPE, **overrides})


def make_model(config: Llada2Config, seed: int = 0) -> Llada2ForDiffusion:
    """The reference network with random weights, wide enough apart that ties are rare."""
    torch.manual_seed(seed)
    model = Llada2ForDiffusion(config).eval()
    for name, tensor in model.state_dict().items():
        if tensor.dim() >= 2:
            tensor.normal_(std=0.15 if "experts" in name or "mlp" in name else 0.1)
        if name.endswith("expert_bias"):
            tensor.normal_(std=0.05)
    return model


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and three special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(special, special=True) for special in SPECIALS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=SPECIALS[0], pad_token=SPECIALS[0], mask_token=SPECIALS[1]
    )


def make_checkpoint(path: Path, *, seed: int = 0, **overrides: Any) -> Llada2ForDiffusion:
    """Write a checkpoint folder; returns the network that it holds. Tied embeddings are stored once."""
    path.mkdir(parents=True, exist_ok=True)
    config = make_config(**overrides)
    model = make_model(config, seed)
    config.save_pretrained(path)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    make_tokenizer().save_pretrained(path)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [TURN_END, EOS], "temperature": 0.0}))
    return model
