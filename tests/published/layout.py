"""The trained checkpoints of examples/ rewritten in the layouts that others publish, and full-size files without data.

A layout is named as the config.json that it takes (NAME.config.json here); what belongs to the size of a network or to
its vocabulary comes from the trained checkpoint, everything else is as published.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from sglang_llada.llada2.config import Llada2Config
from sglang_llada.llada2.weights import expected

HERE = Path(__file__).parent
EXAMPLES = Path(__file__).parents[2] / "examples"
SHARDS = 3
# Of a config.json: what goes with the small network and its vocabulary.
SIZES = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "num_experts num_experts_per_tok num_shared_experts n_group topk_group moe_intermediate_size first_k_dense_replace "
    "rope_theta expert_capacity pad_token_id delete_token_id split_token_id"
).split()
SETTINGS: dict[str, Any] = {  # tokenizer_config.json
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
    "clean_up_tokenization_spaces": False,
    "model_max_length": 32768,
}
BASE_VOCABULARY, TOKENS = 156_891, 157_153
EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(\w+)\.weight")


@dataclass(frozen=True, slots=True)
class Layout:
    """How a checkpoint is published.

    Attributes:
        trained: the folder of examples/ that it is made from.
        bias: type of the routers' expert_bias.
        merged: whether the experts of a layer are one tensor.
        beside: whether template and generation_config.json are files of their own, or neither is.
        resaved: whether transformers 5 has saved the tokenizer again.
    """

    trained: str
    bias: torch.dtype = torch.float32
    merged: bool = False
    beside: bool = False
    resaved: bool = False


LAYOUTS = {
    "LLaDA2.0-mini": Layout("tiny-llada2", torch.bfloat16),
    "LLaDA2.0-flash": Layout("tiny-llada2", torch.bfloat16),
    "LLaDA2.0-mini-CAP": Layout("tiny-llada2", torch.bfloat16),
    "LLaDA2.1-mini": Layout("tiny-llada2.1"),
    "LLaDA2.1-flash": Layout("tiny-llada2.1"),
    "LLaDA2.2-mini": Layout("tiny-llada2.2", beside=True),
    "LLaDA2.2-flash": Layout("tiny-llada2.2", beside=True),
    "LLaDA2.2-mini-rope-parameters-only": Layout("tiny-llada2.2", beside=True),
    "LLaDA2.2-mini-resaved-tf5": Layout("tiny-llada2.2", beside=True, resaved=True),
    "DMax-Math-16B": Layout("tiny-llada2", torch.bfloat16),
    "dFactory-mini-merged": Layout("tiny-llada2", torch.bfloat16, merged=True),
}


def published(name: str) -> dict[str, Any]:
    """A published config.json."""
    return json.loads((HERE / f"{name}.config.json").read_text(encoding="utf-8"))


def write(name: str, parent: Path) -> Path:
    """A small checkpoint in a published layout; returns its folder, which has the published name."""
    layout, folder = LAYOUTS[name], parent / name
    trained = EXAMPLES / layout.trained
    folder.mkdir(parents=True)
    _dump(folder / "config.json", small_config(name))
    write_tokenizer(trained, folder, layout)
    tensors = load_file(trained / "model.safetensors")
    stored = {
        name: tensor.to(layout.bias if "expert_bias" in name else torch.bfloat16) for name, tensor in tensors.items()
    }
    write_shards(merged(stored) if layout.merged else stored, folder)
    return folder


def small_config(name: str) -> dict[str, Any]:
    """A published config.json with the sizes of a trained checkpoint."""
    fields = published(name)
    trained = json.loads((EXAMPLES / LAYOUTS[name].trained / "config.json").read_text(encoding="utf-8"))
    small = fields | {key: trained[key] for key in SIZES if key in fields}
    if "rotary_dim" in fields:
        small["rotary_dim"] = trained["head_dim"] // 2
    if fields.get("rope_parameters"):
        small["rope_parameters"] = fields["rope_parameters"] | {"rope_theta": trained["rope_theta"]}
    return small


def write_tokenizer(trained: Path, folder: Path, layout: Layout) -> None:
    """Tokenizer, template and generation_config.json; the mask is an added token, DELETE and SPLIT are none at all."""
    tokenizer = json.loads((trained / "tokenizer.json").read_text(encoding="utf-8"))
    added = tokenizer["added_tokens"]
    tokenizer["added_tokens"] = [each for each in added if each["content"] not in ("<|delete|>", "<|split|>")]
    _dump(folder / "tokenizer.json", tokenizer)
    settings = dict(SETTINGS)
    template = trained / "chat_template.jinja"
    if layout.beside:
        shutil.copy(template, folder)
        ids = {each["content"]: each["id"] for each in added}
        _dump(folder / "generation_config.json", {"eos_token_id": [ids["<|endoftext|>"], ids["<|role_end|>"]]})
    else:
        settings["chat_template"] = template.read_text(encoding="utf-8")
    _dump(folder / "tokenizer_config.json", settings)
    if layout.resaved:
        PreTrainedTokenizerFast.from_pretrained(folder).save_pretrained(folder)


def write_full_tokenizer(folder: Path) -> None:
    """A tokenizer of the published size, with the tokens that decoding asks for at their published ids."""
    special = {"<|startoftext|>": 156891, "<|endoftext|>": 156892, "<|mask|>": 156895, "<|role_end|>": 156900}
    text_of = {token: text for text, token in special.items()}
    added = [(token, text_of.get(token, f"<|reserved_{token}|>")) for token in range(BASE_VOCABULARY, TOKENS)]
    tokenizer = Tokenizer(models.WordLevel({f"word{token}": token for token in range(BASE_VOCABULARY)}, "word0"))
    tokenizer.add_special_tokens([AddedToken(text, special=True) for _, text in added])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    template = (EXAMPLES / "tiny-llada2" / "chat_template.jinja").read_text(encoding="utf-8")
    _dump(folder / "tokenizer_config.json", SETTINGS | {"chat_template": template})


def merged(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The experts of each layer as one tensor for each matrix, without `.weight`."""
    stacks: dict[str, dict[int, Tensor]] = {}
    rest = {}
    for name, tensor in tensors.items():
        if found := EXPERT.fullmatch(name):
            stacks.setdefault(f"{found[1]}.{found[3]}", {})[int(found[2])] = tensor
        else:
            rest[name] = tensor
    stacked = {name: torch.stack([experts[e] for e in range(len(experts))]) for name, experts in stacks.items()}
    return rest | stacked


def write_shards(tensors: dict[str, Tensor], folder: Path) -> None:
    """Three files of about as many tensors each, and their index."""
    names = sorted(tensors)
    shard_of = {name: shard_name(at * SHARDS // len(names), SHARDS) for at, name in enumerate(names)}
    for file in set(shard_of.values()):
        part = {name: tensors[name].contiguous() for name in names if shard_of[name] == file}
        save_file(part, folder / file, {"format": "pt"})
    size = sum(tensor.nbytes for tensor in tensors.values())
    _dump(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": shard_of})


def write_headers(name: str, folder: Path, shards: int) -> int:
    """The full-size files of a published checkpoint, of which only headers are written; returns the bytes of tensors.

    The rest of each file is a hole, so that it takes no space.
    """
    fields = published(name)
    folder.mkdir(parents=True, exist_ok=True)
    _dump(folder / "config.json", fields)
    shapes = list(expected(Llada2Config(**fields)).items())
    shard_of, total = {}, 0
    for shard in range(shards):
        part = shapes[len(shapes) * shard // shards : len(shapes) * (shard + 1) // shards]
        header, end = {}, 0
        for tensor, shape in part:
            single = "expert_bias" in tensor
            begin, end = end, end + torch.Size(shape).numel() * (4 if single else 2)
            header[tensor] = {"dtype": "F32" if single else "BF16", "shape": shape, "data_offsets": [begin, end]}
            shard_of[tensor] = shard_name(shard, shards)
        written = json.dumps(header).encode()
        with (folder / shard_name(shard, shards)).open("wb") as file:
            file.write(len(written).to_bytes(8, "little") + written)
            file.truncate(8 + len(written) + end)
        total += end
    _dump(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": shard_of})
    return total


def shard_name(shard: int, shards: int) -> str:
    """As transformers names the files of a checkpoint."""
    return f"model-{shard + 1:05}-of-{shards:05}.safetensors"


def _dump(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2), encoding="utf-8")
