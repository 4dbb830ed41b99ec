"""What a checkpoint says, line by line, and what a start with it would refuse; no weights are read.

Every fact comes with the place that states it, because a wrong one rarely shows in answers at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open

from sglang_llada.config import FLAGS, flag_of_checkpoint
from sglang_llada.errors import ConfigError
from sglang_llada.llada2.checkpoint import (
    CheckpointFacts,
    Stated,
    gather,
    read_config,
    read_fields,
    read_generation,
    read_json,
    read_tokenizer,
    stated_ids,
)
from sglang_llada.llada2.config import ARCHITECTURE, Llada2Config, remarks, stated_in
from sglang_llada.llada2.weights import check_files

SHOWN = ("format", "fmt", "weight_block_size", "bits")  # of a quantisation
INDEX = "model.safetensors.index.json"
BF16_BYTES = 2


@dataclass(slots=True)
class Report:
    """Lines of facts, remarks that change nothing, and what a start would refuse; filled by the functions below."""

    facts: list[tuple[str, str]] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)

    def lines(self) -> Iterator[str]:
        """As they are printed."""
        for name, said in self.facts:
            yield f"{name:13} {said}"
        for remark in self.remarks:
            yield f"{'warning':13} {remark}"
        for refusal in self.refusals:
            yield f"{'refused':13} {refusal}"
        if not self.refusals:
            yield f"{'start':13} nothing of this is refused"

    def add(self, facts: Callable[[], Iterable[tuple[str, str]]]) -> None:
        """Take over facts; what cannot be read is a refusal."""
        try:
            self.facts.extend(facts())
        except ConfigError as error:
            self.refusals.append(str(error))


def report(model: str, folder: Path) -> Report:
    """Everything that is read of a checkpoint before its weights are; `model` is what the user calls it.

    Raises:
        ConfigError: it has no config.json.
    """
    fields = read_fields(folder)
    out = Report([("checkpoint", model if Path(model) == folder else f"{model}, in {folder}")])
    out.add(lambda: of_class(fields))
    if out.refusals:
        return out
    try:
        config = read_config(folder)
    except ConfigError as error:
        out.refusals.append(str(error))
        return out
    out.remarks = remarks(fields)
    out.facts.extend(of_network(config, fields))
    out.add(lambda: of_tokens(folder, config, model))
    out.add(lambda: of_files(folder))
    return out


def of_class(fields: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Whether it is ours at all."""
    architectures = fields.get("architectures") or []
    if ARCHITECTURE not in architectures:
        raise ConfigError(
            f"config.json: architectures is {architectures}; allowed: {[ARCHITECTURE]}. Others are left to the host"
        )
    yield "model", f"{ARCHITECTURE}, model_type {fields.get('model_type')}"


def of_network(c: Llada2Config, fields: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Shapes, routing and positions."""
    yield (
        "network",
        f"{c.num_hidden_layers} layers, the first {c.first_k_dense_replace} dense; hidden {c.hidden_size}; "
        f"{c.num_attention_heads} heads and {c.num_key_value_heads} KV heads of {c.head_dim}; "
        f"vocabulary {c.vocab_size}{', tied' if c.tie_word_embeddings else ''}",
    )
    chosen = (
        f"of the {c.topk_group} best of {c.n_group} groups"
        if c.expert_capacity is None
        else f"of the {c.expert_capacity} best of the block (expert_capacity)"
    )
    yield (
        "routing",
        f"{c.num_experts_per_tok} of {c.num_experts} experts, {chosen}; weights "
        f"{'normalised, ' if c.norm_topk_prob else ''}x {c.routed_scaling_factor}; {c.num_shared_experts} shared",
    )
    places = ", ".join(stated_in("rope_theta", fields)) or "not stated"
    yield "rotary", f"base {c.rope_theta:,.10g} ({places}), {c.rotary_dim} of {c.head_dim} dimensions"
    yield "positions", f"{c.max_position_embeddings}, in blocks of {c.block_size}"
    cached = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * BF16_BYTES
    yield (
        "KV cache",
        f"{cached:,} bytes a token in bf16, {cached * c.max_position_embeddings / 1e9:.2f} GB a request at most",
    )
    yield "dtype", str(fields.get("dtype") or fields.get("torch_dtype") or "not stated")
    yield "quantisation", quantisation(fields)


def quantisation(fields: Mapping[str, Any]) -> str:
    """How the weights are stored, by the name that the host looks for."""
    for name in ("quantization_config", "compression_config"):
        said = fields.get(name)
        if said:
            more = ", ".join(
                f"{key} {said[key]}" for key in ("format", "fmt", "weight_block_size", "bits") if key in said
            )
            return f"{said.get('quant_method', 'of no named method')}{f' ({more})' if more else ''} by {name}"
    return "none"


def of_tokens(folder: Path, config: Llada2Config, model: str) -> Iterator[tuple[str, str]]:
    """Ids with the places that state them, the algorithm that follows, and the chat template."""
    tokenizer, generation = read_tokenizer(folder, config), read_generation(folder)
    stated = stated_ids(config, tokenizer, generation)
    for name, places in (("mask", stated.mask), ("stops", stated.stops), ("bos", stated.bos), ("pad", stated.pad)):
        yield name, by_token(places)
    facts = gather(config, tokenizer, generation)
    yield "DELETE, SPLIT", f"{facts.delete_id}, {facts.split_id} (config.json)" if facts.indel else "none"
    yield "algorithm", algorithm(facts, model)
    yield "template", template(folder, tokenizer)


def by_token(places: Iterable[Stated]) -> str:
    """Each id with all places that state it."""
    found: dict[int, list[str]] = {}
    for each in places:
        found.setdefault(each.token, []).append(each.where)
    return "; ".join(f"{token} ({', '.join(where)})" for token, where in found.items()) or "none"


def algorithm(facts: CheckpointFacts, model: str) -> str:
    """How it is decoded when nobody says."""
    flag = flag_of_checkpoint(model, indel=facts.indel)
    why = "delete_token_id and split_token_id" if facts.indel else "the name of the checkpoint"
    return f"{FLAGS[flag]} (--dllm-algorithm {flag}), by {why}"


def template(folder: Path, tokenizer: Any) -> str:
    """Where the chat template stands."""
    if not tokenizer.chat_template:
        return "none: chat requests need --chat-template"
    return "chat_template.jinja" if (folder / "chat_template.jinja").is_file() else "tokenizer_config.json"


def of_files(folder: Path) -> Iterator[tuple[str, str]]:
    """How many tensors there are; ConfigError if they are not those that config.json asks for."""
    index = folder / INDEX
    named = set(read_json(index)["weight_map"].values()) if index.is_file() else set()
    files = sorted(file for file in folder.glob("*.safetensors") if not named or file.name in named)
    of_all = f"{len(files)} of {len(named)}" if named else f"{len(files)}"
    size = sum(file.stat().st_size for file in files)
    yield "weights", f"{of_all} files here, {size:,} bytes" if files else "no files here, so tensors are not checked"
    if files:
        check_files(folder)
        yield "tensors", f"{sum(map(_tensors_of, files)):,}, as config.json asks"


def _tensors_of(file: Path) -> int:
    with safe_open(file, framework="pt") as tensors:
        return len(list(tensors.keys()))
