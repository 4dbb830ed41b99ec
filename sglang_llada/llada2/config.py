"""The LLaDA2 configuration: what each field of config.json means here, checked before a layer is built.

Field names are those of the published checkpoints (inclusionAI/LLaDA2.0-mini and its successors). FIELDS is the one
place that says what is done with each of them; a field that is not there changes nothing, and `remarks` names it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig, PretrainedConfig

from sglang_llada.errors import ConfigError

MODEL_TYPE = "llada2_moe"
MERGED_MODEL_TYPE = "llada2_moe_veomni"
ARCHITECTURE = "LLaDA2MoeModelLM"
MOST_POSITIONS = 63  # of a block: sets of them are numbers of 64 bits
NOUNS = {int: "an integer", float: "a number", bool: "true or false", list: "a list of integers"}


@dataclass(frozen=True, slots=True)
class Field:
    """What a field of config.json is to us; null is as good as absent.

    Attributes:
        says: what it stands for, in a few words.
        kinds: types of a value that the network or the decode is made from; empty if there is none.
        default: what it is taken to be where config.json has none.
        low, high: bounds of such a value; None: none.
        allowed: where not empty, the only values that mean what is computed here; others are refused.
        refused: whether any value is.
    """

    says: str
    kinds: tuple[type, ...] = ()
    default: Any = None
    low: float | None = None
    high: float | None = None
    allowed: tuple[Any, ...] = ()
    refused: bool = False

    @property
    def kept(self) -> bool:
        """Whether it becomes an attribute, stated or not."""
        return self.kinds != () or self.allowed != ()

    def complaint(self, name: str, value: Any) -> str | None:
        """What is wrong with a value; None if nothing is."""
        if self.refused:
            return f"{name} is {value!r}: {self.says}"
        if self.allowed:
            named = " or ".join(map(repr, self.allowed))
            return None if value in self.allowed else f"{name} is {value!r}; allowed: {named} ({self.says})"
        if not self.kinds or (any(is_a(value, kind) for kind in self.kinds) and self._within(value)):
            return None
        bounds = "" if self.low is None else f" from {self.low}" + ("" if self.high is None else f" to {self.high}")
        return f"{name} is {value!r}; allowed: {' or '.join(NOUNS[kind] for kind in self.kinds)}{bounds}"

    def _within(self, value: Any) -> bool:
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high)


def is_a(value: Any, kind: type) -> bool:
    """Whether a value of config.json is of a kind: true is no integer, an integer is a number."""
    if kind is list:
        return type(value) is list and all(type(each) is int for each in value)
    return type(value) is kind or (kind is float and type(value) is int)


def size(default: int | None, says: str, low: int = 1, high: int | None = None) -> Field:
    """A field that the network is made from, an integer."""
    return Field(says, (int,), default, low, high)


def number(default: float, says: str) -> Field:
    """A field that the network computes with."""
    return Field(says, (float,), default, 0.0)


def switch(default: bool, says: str) -> Field:
    """A field that turns a part of the network on."""
    return Field(says, (bool,), default)


def token(says: str, *more: type) -> Field:
    """The id of a token, which the tokenizer may say too."""
    return Field(says, (int, *more))


def only(*allowed: Any, says: str) -> Field:
    """A field that could contradict what is computed, with the values that do not."""
    return Field(says, default=allowed[0], allowed=allowed)


def ignored(says: str) -> Field:
    """A field that changes nothing in what is served."""
    return Field(says)


FIELDS: dict[str, Field] = {
    # What the network is made from.
    "vocab_size": size(157184, "rows of the embeddings and of the head"),
    "hidden_size": size(2048, "width of the residual stream"),
    "intermediate_size": size(5120, "width of a dense feed-forward layer"),
    "num_hidden_layers": size(20, "layers"),
    "num_attention_heads": size(16, "query heads"),
    "num_key_value_heads": size(4, "KV heads"),
    "head_dim": size(None, "width of a head; hidden_size / num_attention_heads if absent"),
    "rms_norm_eps": number(1e-6, "what norms add to the mean square"),
    "max_position_embeddings": size(32768, "positions of a request"),
    "rope_theta": number(600000.0, "rotary base"),
    "partial_rotary_factor": number(0.5, "part of a head that is turned"),
    "num_experts": size(256, "routed experts of a layer"),
    "num_experts_per_tok": size(8, "experts that a token is sent to"),
    "num_shared_experts": size(1, "experts that see every token", low=0),
    "n_group": size(8, "groups of experts", low=0),
    "topk_group": size(4, "groups that a token may choose from", low=0),
    "moe_intermediate_size": size(512, "width of an expert"),
    "moe_shared_expert_intermediate_size": size(None, "width of a shared expert; moe_intermediate_size if absent"),
    "first_k_dense_replace": size(1, "first layers, which have no experts", low=0),
    "moe_router_enable_expert_bias": switch(True, "whether routers have a bias for the choice of experts"),
    "norm_topk_prob": switch(True, "whether the weights of a token's experts are made to sum to one"),
    "routed_scaling_factor": number(2.5, "what the routed experts' sum is multiplied by"),
    "expert_capacity": size(None, "experts that a block may use: block routing, in place of groups (LLaDA2.2)"),
    "tie_word_embeddings": switch(False, "whether the head is the embeddings"),
    # What the decode is made from.
    "block_size": size(32, "positions that are decided together", high=MOST_POSITIONS),
    "mask_token_id": token("the mask"),
    "eos_token_id": token("what ends an answer", list),
    "bos_token_id": token("what a text begins with"),
    "pad_token_id": token("what fills a batch"),
    "delete_token_id": token("what deletes its position (LLaDA2.2)"),
    "split_token_id": token("what asks for a position before it (LLaDA2.2)"),
    # Checked against the fields above.
    "rotary_dim": size(None, "head_dim x partial_rotary_factor, again"),
    "rope_parameters": ignored("rotary base and factor, as transformers 5 states them"),  # read by rotary_of
    "rope_scaling": ignored("the same by its older name"),
    # One value is what is computed here.
    "hidden_act": only("silu", says="the activation of every feed-forward layer"),
    "score_function": only("sigmoid", says="how LLaDA2 routes"),
    "router_dtype": only("fp32", "float32", says="routers are computed in it"),
    "use_bias": only(False, says="no LLaDA2 layer has a bias"),
    "use_qkv_bias": only(False, says="no LLaDA2 layer has a bias"),
    "use_qk_norm": only(True, says="LLaDA2 normalises queries and keys"),
    "use_rmsnorm": only(True, says="every norm is one"),
    "norm_head": only(False, says="the head's rows are taken as they are"),
    "norm_softmax": only(False, says="probabilities are those of the plain softmax"),
    "use_sliding_window": only(False, says="every layer attends to all earlier blocks"),
    "using_split_qkv_in_self_attention": only(False, says="query, key and value are one matrix"),
    "image_token_offset": Field(
        "this is a model of text and images (as LLaDA2.0-Uni), and only models of text are served: image tokens need "
        "codecs and ways to decode that are not here",
        refused=True,
    ),
    # Known, and nothing to us.
    "embedding_dropout": ignored("training"),
    "attention_dropout": ignored("training"),
    "output_dropout": ignored("training"),
    "initializer_range": ignored("training"),
    "output_router_logits": ignored("training"),
    "_moe_implementation": ignored("how another program computes the same experts"),
    "use_cache": ignored("whether another program keeps KV"),
    "sliding_window": ignored("for use_sliding_window"),
    "max_window_layers": ignored("for use_sliding_window"),
    "architectures": ignored("what the host chooses the model class by"),
    "model_type": ignored("what transformers chooses this class by"),
    "auto_map": ignored("code beside the checkpoint, which is not needed here"),
    "dtype": ignored("what the host computes in unless --dtype says"),
    "torch_dtype": ignored("the same by its older name"),
    "quantization_config": ignored("read by the host's quantisation"),
    "compression_config": ignored("the same by its older name"),
    "transformers_version": ignored("who wrote the file"),
}
# What tensors cannot contradict: guessed wrong, answers are wrong.
UNSEEN = (
    "rms_norm_eps num_experts_per_tok n_group topk_group norm_topk_prob routed_scaling_factor rope_theta "
    "partial_rotary_factor max_position_embeddings"
).split()
ROPE_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}


class Llada2Config(PretrainedConfig):
    """Shapes and routing of a LLaDA2 MoE checkpoint; every field of FIELDS that is kept is an attribute.

    However config.json states them, rope_theta, partial_rotary_factor and rotary_dim hold what is computed, and
    rope_parameters is None.

    Raises:
        ConfigError: a field contradicts another or names something that this package does not implement.
    """

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope_theta: float
    partial_rotary_factor: float
    rotary_dim: int
    num_experts: int
    num_experts_per_tok: int
    num_shared_experts: int
    n_group: int
    topk_group: int
    moe_intermediate_size: int
    moe_shared_expert_intermediate_size: int | None
    first_k_dense_replace: int
    moe_router_enable_expert_bias: bool
    norm_topk_prob: bool
    routed_scaling_factor: float
    expert_capacity: int | None
    tie_word_embeddings: bool
    block_size: int
    mask_token_id: int | None
    eos_token_id: int | list[int] | None
    bos_token_id: int | None
    pad_token_id: int | None
    delete_token_id: int | None
    split_token_id: int | None

    def __init__(self, **fields: Any) -> None:
        said = {name: value for name, value in fields.items() if value is not None}
        refuse([FIELDS[name].complaint(name, value) for name, value in said.items() if name in FIELDS])
        values = {name: said.get(name, field.default) for name, field in FIELDS.items() if field.kept}
        values["head_dim"] = values["head_dim"] or values["hidden_size"] // values["num_attention_heads"]
        values |= rotary_of(said, values["head_dim"])
        # Attributes before transformers' own __init__, which reads some; the rest become attributes there.
        for name, value in values.items():
            setattr(self, name, value)
        super().__init__(**{**fields, **values, "rope_scaling": None, "rope_parameters": None})
        refuse(contradictions(self))

    @property
    def shared_intermediate_size(self) -> int:
        """Width of the fused shared experts."""
        return (self.moe_shared_expert_intermediate_size or self.moe_intermediate_size) * self.num_shared_experts

    def is_dense(self, layer: int) -> bool:
        """Whether a layer has a plain MLP instead of experts."""
        return layer < self.first_k_dense_replace


class MergedConfig(Llada2Config):
    """The same model as dFactory writes it, with one tensor for all experts of a layer."""

    model_type = MERGED_MODEL_TYPE
    __init__ = Llada2Config.__init__  # transformers would make one of its own for a class without


def refuse(complaints: list[str | None]) -> None:
    """Raise ConfigError with everything that is wrong."""
    wrong = [complaint for complaint in complaints if complaint is not None]
    if wrong:
        raise ConfigError("config.json: " + "; ".join(wrong))


def remarks(fields: Mapping[str, Any]) -> list[str]:
    """What somebody should know of a config.json that is served anyway: fields of no known meaning, values guessed."""
    own = {*PretrainedConfig().to_dict(), *GenerationConfig().to_dict(), *vars(PretrainedConfig())}
    unknown = [name for name in fields if name not in FIELDS and name not in own]
    guessed = [name for name in UNSEEN if not stated_in(name, fields)]
    if fields.get("expert_capacity") is not None:
        guessed = [name for name in guessed if name not in ("n_group", "topk_group")]
    if fields.get("rotary_dim") is not None:
        guessed = [name for name in guessed if name != "partial_rotary_factor"]
    out = []
    if unknown:
        out.append(f"config.json: nothing is known of {', '.join(unknown)}, which changes nothing here")
    if guessed:
        taken = ", ".join(f"{name} {FIELDS[name].default}" for name in guessed)
        out.append(f"config.json does not say {', '.join(guessed)}; taken as in LLaDA2.0-mini: {taken}")
    return out


def rotary_of(fields: Mapping[str, Any], head_dim: int) -> dict[str, Any]:
    """rope_theta, partial_rotary_factor and rotary_dim, wherever config.json states them.

    transformers writes them as fields, or in a dict `rope_parameters` (once `rope_scaling`), which may in turn hold a
    dict for each kind of layer. Whatever is stated twice must agree.
    """
    theta = agreed("rope_theta", fields)
    factor = agreed("partial_rotary_factor", fields)
    stated = fields.get("rotary_dim")
    if factor is None:
        factor = FIELDS["partial_rotary_factor"].default if stated is None else stated / head_dim
    turned = int(head_dim * factor)
    if stated not in (None, turned):
        refuse(
            [f"rotary_dim is {stated}, but head_dim {head_dim} x partial_rotary_factor {factor} is {head_dim * factor}"]
        )
    return {
        "rope_theta": FIELDS["rope_theta"].default if theta is None else theta,
        "partial_rotary_factor": factor,
        "rotary_dim": turned,
    }


def rope_dicts(fields: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The dicts of rotary parameters in config.json, each with its name; ConfigError if one asks for a scaling."""
    for name in ("rope_parameters", "rope_scaling"):
        outer = fields.get(name)
        if outer is None:
            continue
        if not isinstance(outer, dict):
            raise ConfigError(f"config.json: {name} is {outer!r}; allowed: a mapping")
        by_layer = outer != {} and all(isinstance(inner, dict) for inner in outer.values())
        for where, found in [(f"{name}.{key}", outer[key]) for key in outer] if by_layer else [(name, outer)]:
            parameters = {key: value for key, value in found.items() if value is not None}
            kind = parameters.get("rope_type", parameters.get("type", "default"))
            if kind != "default" or not parameters.keys() <= ROPE_KEYS:
                raise ConfigError(f"config.json: {where} is {found}; only plain rotary is implemented")
            yield where, parameters


def stated_in(name: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The places of config.json that state a rotary parameter, with what they state."""
    places = [("", fields), *((f"{where}.", parameters) for where, parameters in rope_dicts(fields))]
    return {where + name: found[name] for where, found in places if found.get(name) is not None}


def agreed(name: str, fields: Mapping[str, Any]) -> Any:
    """The value of a rotary parameter in every place that states it; None if none does."""
    stated = stated_in(name, fields)
    refuse([FIELDS[name].complaint(where, value) for where, value in stated.items()])
    if len(set(stated.values())) > 1:
        refuse([" but ".join(f"{where} is {value}" for where, value in stated.items())])
    return next(iter(stated.values()), None)


def contradictions(config: Llada2Config) -> list[str | None]:
    """What the fields of a configuration say against each other."""
    c = config
    rules = [
        (
            c.num_attention_heads % c.num_key_value_heads == 0,
            f"num_attention_heads {c.num_attention_heads} is no multiple of "
            f"num_key_value_heads {c.num_key_value_heads}",
        ),
        (
            c.rotary_dim % 2 == 0 and 0 < c.rotary_dim <= c.head_dim,
            f"rotary dimension {c.rotary_dim} (head_dim {c.head_dim} x partial_rotary_factor "
            f"{c.partial_rotary_factor}) is not an even number from 2 to head_dim",
        ),
        (
            c.first_k_dense_replace <= c.num_hidden_layers,
            f"first_k_dense_replace {c.first_k_dense_replace} is outside 0 to num_hidden_layers {c.num_hidden_layers}",
        ),
        (
            c.expert_capacity is None or c.num_experts_per_tok <= c.expert_capacity <= c.num_experts,
            f"expert_capacity {c.expert_capacity} is outside num_experts_per_tok {c.num_experts_per_tok} "
            f"to num_experts {c.num_experts}",
        ),
        (
            c.expert_capacity is not None or (c.n_group >= 1 and c.num_experts % c.n_group == 0),
            f"num_experts {c.num_experts} does not split into n_group {c.n_group} equal groups",
        ),
    ]
    wrong: list[str | None] = [message for holds, message in rules if not holds]
    if not wrong and c.expert_capacity is None:  # which replaces groups
        group = c.num_experts // c.n_group
        if group < 2:
            wrong.append(f"expert groups of {group}: a group's score is the sum of its two best, so 2 are needed")
        if not 1 <= c.topk_group <= c.n_group:
            wrong.append(f"topk_group {c.topk_group} is outside 1 to n_group {c.n_group}")
        elif c.num_experts_per_tok > c.topk_group * group:
            wrong.append(
                f"num_experts_per_tok {c.num_experts_per_tok} is outside 1 to {c.topk_group * group}, "
                f"the experts of topk_group {c.topk_group} groups"
            )
    return wrong
