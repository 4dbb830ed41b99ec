"""The strict weight map: which tensors a checkpoint must have, under which names and in which shapes.

Published checkpoints come in two spellings: plain, and with the prefixes `model.language_model.` and `model.lm_head.`;
either may hold an expert matrix per expert or fused, `mlp.experts.gate_proj` [E, ...]. `canonical` brings all to the
plain, per-expert spelling. Nothing is skipped: a name that is missing, unknown, doubled or misshapen stops the start.

What a quantised matrix is made of only the layer that holds it knows: the host's model says which tensors it wants
(host/models/parts/loading.py). Before there is a model, `check_files` holds such a checkpoint to what can be known
then: every matrix of the network is there in some form, and what is stored as it is has its shape.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sglang_llada.errors import ConfigError
from sglang_llada.llada2.checkpoint import read_config
from sglang_llada.llada2.config import Llada2Config
from sglang_llada.llada2.reference import Llada2ForDiffusion

SHOWN = 8  # names that an error lists of each kind
FUSED = re.compile(r"(.*\.mlp\.experts)\.(gate_proj|up_proj|down_proj)(?:\.(\w+))?$")
PREFIXES = {"model.language_model.": "model.", "model.lm_head.": "lm_head."}  # of the other spelling
# Where a quantised checkpoint says so: a key of config.json, or a file of its own.
QUANTISATION_KEYS = ("quantization_config", "compression_config")
QUANTISATION_FILES = ("hf_quant_config.json", "quant_model_description.json")

Shape = tuple[int, ...]


def expected(config: Llada2Config) -> dict[str, Shape]:
    """Every tensor of a checkpoint, by its canonical name."""
    c, H, I = config, config.hidden_size, config.moe_intermediate_size
    heads = c.num_attention_heads + 2 * c.num_key_value_heads
    shapes: dict[str, Shape] = {"model.word_embeddings.weight": (c.vocab_size, H), "model.norm.weight": (H,)}
    if not c.tie_word_embeddings:
        shapes["lm_head.weight"] = (c.vocab_size, H)
    for layer in range(c.num_hidden_layers):
        p = f"model.layers.{layer}"
        shapes[f"{p}.input_layernorm.weight"] = (H,)
        shapes[f"{p}.post_attention_layernorm.weight"] = (H,)
        shapes[f"{p}.attention.query_key_value.weight"] = (heads * c.head_dim, H)
        shapes[f"{p}.attention.query_layernorm.weight"] = (c.head_dim,)
        shapes[f"{p}.attention.key_layernorm.weight"] = (c.head_dim,)
        shapes[f"{p}.attention.dense.weight"] = (H, c.num_attention_heads * c.head_dim)
        if c.is_dense(layer):
            shapes |= _mlp(f"{p}.mlp", H, c.intermediate_size)
            continue
        shapes[f"{p}.mlp.gate.weight"] = (c.num_experts, H)
        if c.moe_router_enable_expert_bias:
            shapes[f"{p}.mlp.gate.expert_bias"] = (c.num_experts,)
        if c.num_shared_experts:
            shapes |= _mlp(f"{p}.mlp.shared_experts", H, c.shared_intermediate_size)
        for expert in range(c.num_experts):
            shapes |= _mlp(f"{p}.mlp.experts.{expert}", H, I)
    return shapes


def _mlp(prefix: str, hidden: int, width: int) -> dict[str, Shape]:
    return {
        f"{prefix}.gate_proj.weight": (width, hidden),
        f"{prefix}.up_proj.weight": (width, hidden),
        f"{prefix}.down_proj.weight": (hidden, width),
    }


def canonical(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The tensors under plain, per-expert names; fused expert tensors are split."""
    for name, tensor in tensors:
        for prefix, plain in PREFIXES.items():
            if name.startswith(prefix):
                name = plain + name.removeprefix(prefix)
        if fused := FUSED.match(name):
            prefix, matrix, leaf = fused.groups()
            for expert, part in enumerate(tensor):
                yield f"{prefix}.{expert}.{matrix}.{leaf or 'weight'}", part
        else:
            yield name, tensor


class Ledger:
    """Ticks off tensors as they come.

    Args:
        shapes: the tensors that may come. A shape of None is one that only the layer which holds the tensor knows.
        optional: those of them that need not come.
    """

    def __init__(self, shapes: Mapping[str, Shape | None], optional: Collection[str] = ()) -> None:
        self.shapes = shapes
        self.optional = optional
        self.seen: set[str] = set()
        self.wrong: list[str] = []

    def tick(self, name: str, tensor: Tensor) -> bool:
        """Note a tensor; False if it must not be loaded."""
        got = tuple(tensor.shape)
        if name not in self.shapes:
            if not says_nothing(name, tensor):
                self.wrong.append(f"unknown tensor {name} {list(got)}")
            return False
        want = self.shapes[name]
        if want is not None and not as_it_is(tensor):
            self.wrong.append(f"{name} holds numbers of {tensor.dtype}, and must not or nothing says how to read them")
        elif want is not None and want != got:
            self.wrong.append(f"{name} has shape {list(got)}, expected {list(want)}")
        elif name in self.seen:
            self.wrong.append(f"{name} comes twice")
        self.seen.add(name)
        return want in (None, got)

    def close(self, *, complete: bool = True) -> None:
        """Raise ConfigError with everything that was wrong; with `complete`, missing tensors are wrong too."""
        wanted = [name for name in self.shapes if name not in self.optional] if complete else []
        missing = [f"missing tensor {name}" for name in wanted if name not in self.seen]
        problems = some(self.wrong) + some(missing)
        if problems:
            raise ConfigError("the checkpoint does not fit its config.json: " + "; ".join(problems))


def as_it_is(tensor: Tensor) -> bool:
    """Whether a tensor is stored as it is: no integers, no floats of 8 bits."""
    return tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1


def says_nothing(name: str, tensor: Tensor) -> bool:
    """Whether a tensor that nothing asks for changes nothing, as some tools write: the only ones that are left out.

    A bias of zeros; an order of inputs that is the natural one; the scales of a KV cache that is not quantised.
    """
    leaf = name.rpartition(".")[2]
    if leaf in ("k_scale", "v_scale"):
        return True
    if leaf == "bias":
        return not tensor.any()
    return leaf.endswith("g_idx") and bool((tensor.diff() >= 0).all())


def some(messages: list[str]) -> list[str]:
    """The first of many messages, and how many more there are."""
    rest = len(messages) - SHOWN
    return messages[:SHOWN] + ([f"and {rest} more like that"] if rest > 0 else [])


def quantisation(folder: Path) -> str | None:
    """Where a folder says that its checkpoint is quantised; None if it does not."""
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    where = [f"config.json, {key}" for key in QUANTISATION_KEYS if fields.get(key)]
    where += [file for file in QUANTISATION_FILES if (folder / file).is_file()]
    return where[0] if where else None


def check_files(folder: Path, *, declared: bool = False) -> None:
    """Raise ConfigError unless a folder's tensors are those that its config.json asks for; reads no weights.

    What a quantised one is made of is not known here, see above; `declared` says that it is one where its files do not.
    """
    config = read_config(folder)
    shapes, quantised = expected(config), declared or quantisation(folder) is not None
    ledger = Ledger(shapes)
    modules = {name.rpartition(".")[0] for name in shapes}
    holders = {holder for module in modules for holder in _above(module)}
    pieces = []  # of quantised matrices, or measured around them
    for name, tensor in canonical(headers(folder)):
        holder = name.rpartition(".")[0]
        if config.tie_word_embeddings and name == "lm_head.weight":
            continue
        if holder not in holders or (name in shapes and as_it_is(tensor)):
            ledger.tick(name, tensor)
        else:
            pieces.append(name)
            ledger.seen |= {f"{holder}.weight"} & shapes.keys()
    if pieces and not quantised:
        places = ", ".join(f"{key} of config.json" for key in QUANTISATION_KEYS)
        raise ConfigError(
            f"{pieces[0]} and {len(pieces) - 1} more tensors are parts of quantised matrices, and nothing says how to "
            f"read them; allowed: {places}, {', '.join(QUANTISATION_FILES)}, --quantization"
        )
    ledger.close()


def _above(module: str) -> Iterator[str]:
    """A module's name and those of all that hold it."""
    while module:
        yield module
        module = module.rpartition(".")[0]


def read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a checkpoint folder, from its safetensors files."""
    for file in _files(folder):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                yield name, tensors.get_tensor(name)


def headers(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """As read_tensors, without their data; of their types only what `as_it_is` asks."""
    for file in _files(folder):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - not a dict
                    header = tensors.get_slice(name)
                    dtype = torch.float32 if header.get_dtype() in ("BF16", "F16", "F32", "F64") else torch.uint8
                    yield name, torch.empty(header.get_shape(), dtype=dtype, device="meta")
        except SafetensorError as error:
            raise ConfigError(f"{file} cannot be read, perhaps because it is not complete: {error}") from None


def _files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        names = sorted(file.name for file in folder.glob("*.safetensors"))
    if not names:
        raise ConfigError(f"{folder}: there are no .safetensors files")
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise ConfigError(f"{folder}: {index.name} names files that are not there: {', '.join(some(absent))}")
    return [folder / name for name in names]


def load_reference(path: str | Path, dtype: torch.dtype = torch.float32) -> Llada2ForDiffusion:
    """The reference network with a checkpoint's weights, ready to run."""
    folder = Path(path)
    config = read_config(folder)
    with torch.device("meta"):
        model = Llada2ForDiffusion(config)
    ledger, state = Ledger(expected(config)), {}
    for name, tensor in canonical(read_tensors(folder)):
        if config.tie_word_embeddings and name == "lm_head.weight":
            continue  # some tied checkpoints store the embedding twice
        if ledger.tick(name, tensor):
            state[name] = tensor.float() if ".mlp.gate." in name else tensor.to(dtype)
    ledger.close()
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.word_embeddings.weight"]
    model.load_state_dict(state, assign=True)
    return model.eval()
