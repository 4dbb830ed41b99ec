"""Quantised checkpoints of every kind: that each tensor lands in its place in the host's layers, and what is answered.

Layers are built as for a GPU, in one process for all kinds (tests/host/pretend.py). Answers are given by servers on the
CPU, which multiply by what the matrices stand for.
"""

from __future__ import annotations

import re
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from examples.tiny_llada2.evaluate import by_server, evaluate, total
from examples.tiny_llada2.tasks import examples
from sglang_llada.errors import ConfigError
from sglang_llada.llada2.weights import check_files
from tests.host.conftest import TINY
from tests.host.pretend import HOPPER, built, in_a_process
from tests.host.serving import serving
from tests.quantised import FORMATS, padded, quantise
from tests.toy import make_checkpoint

pytestmark = [pytest.mark.host, pytest.mark.slow, pytest.mark.timeout(600)]

# As every kernel of the host wants them: multiples of 128.
SIZES = {"hidden_size": 128, "num_attention_heads": 4, "head_dim": 64, "intermediate_size": 256}
SIZES |= {"moe_intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 320}
SIZES |= {"num_experts": 4, "n_group": 2, "num_experts_per_tok": 2}
BY_COLUMN = ("qweight", "qzeros", "scales")  # matrices that are stored [K, N]
UP, EXPERT = "model.layers.1.mlp.shared_experts.up_proj.", "model.layers.1.mlp.experts.3.down_proj."
OWN = (
    "_scale",
    "sort_indices",
    "_swizzled",
)  # ends of parameters that come from no tensor here: KV scales, and made ones


# --- in the processes that build layers -----------------------------------------------------------------------------


def placed(folder: Path) -> dict[str, Any]:
    """Load a checkpoint, whole and in halves; what is not where it belongs, and what is said of faults."""
    tensors = load_file(folder / "model.safetensors")
    wanted = {name: want for name, want in assembled(tensors).items() if name.startswith("model.layers.")}
    model = built(folder)
    model.load_weights(tensors.items())
    params = dict(model.named_parameters())
    return {
        "misplaced": misplaced(params, wanted),
        "from nowhere": [name for name in params if name not in assembled(tensors) and not name.endswith(OWN)],
        "misplaced in halves": [misplaced(*half(folder, tensors, wanted, rank)) for rank in range(2)],
        "methods": sorted({type(module.quant_method).__name__ for module in model.modules() if has_method(module)}),
        "told": {fault: told(model, change(dict(tensors))) for fault, change in FAULTS.items()},
        "KV scale": kv_scale(model, tensors),
        "router": {str(param.dtype) for name, param in params.items() if ".mlp.gate." in name},
    }


def half(folder: Path, tensors: dict[str, Tensor], wanted: dict[str, Tensor], rank: int) -> tuple[Any, Any]:
    """One rank's parameters of two ranks', and what they must hold."""
    model = built(folder, rank, 2)
    model.load_weights(tensors.items())
    return dict(model.named_parameters()), {name: part(name, want, rank) for name, want in wanted.items()}


def misplaced(params: dict[str, Tensor], wanted: dict[str, Tensor]) -> list[str]:
    return [name for name, want in wanted.items() if not is_held(params[name], want)]


def part(name: str, whole: Tensor, rank: int) -> Tensor:
    """A rank's half of a parameter; what is not as long as the matrix, or its groups, is not split."""
    rows, columns = (-1, -2) if leaf_of(name) in BY_COLUMN else (-2, -1)
    matrix = whole.dim() - (".experts." in name) == 2
    if re.search(r"attention\.dense\.|\.down_proj\.|\.w2_", name):
        split = whole.shape[columns] > 1 if matrix else name.endswith("g_idx")
        return whole.chunk(2, columns if matrix else -1)[rank] if split else whole
    if not matrix:
        return whole
    pieces = whole.chunk(2, rows)
    if "query_key_value" in name:  # as many query heads as key and value heads together
        pieces = (pieces[0], *pieces[1].chunk(2, rows))
    return torch.cat([piece.chunk(2, rows)[rank] for piece in pieces], rows) if fused(name) else whole


def fused(name: str) -> bool:
    return any(kind in name for kind in ("query_key_value", "gate_up_proj", ".w13_"))


def leaf_of(name: str) -> str:
    return name.rpartition(".")[2].removeprefix("w13_").removeprefix("w2_")


def has_method(module: Any) -> bool:
    return getattr(module, "quant_method", None) is not None


def assembled(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the host's fused and stacked parameters must hold."""
    groups: dict[str, list[Tensor]] = {}
    for name in sorted(tensors, key=lambda name: [int(n) if n.isdigit() else n for n in re.split(r"(\d+)", name)]):
        fused = re.sub(r"\.(gate|up)_proj\.", ".gate_up_proj.", name)
        stacked = re.sub(r"experts\.\d+\.gate_up_proj\.", "experts.w13_", fused)
        stacked = re.sub(r"experts\.\d+\.down_proj\.", "experts.w2_", stacked)
        groups.setdefault(stacked, []).append(tensors[name])
    return {name: joined(name, parts) for name, parts in groups.items()}


def joined(name: str, parts: list[Tensor]) -> Tensor:
    """Parts of a parameter, fused in twos where it is gate and up, and stacked where it is experts'."""
    dim = 1 if leaf_of(name) in BY_COLUMN else 0
    parts = [part.reshape(1) if part.numel() == 1 else part for part in parts]
    if "gate_up_proj" in name or ".w13_" in name:
        alike = name.endswith("g_idx")  # kept once
        parts = [a if alike else torch.cat((a, b), dim) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return torch.stack(parts) if ".experts." in name else parts[0]


def is_held(param: Tensor, want: Tensor) -> bool:
    """Whether a parameter holds numbers; one that is the same for fused matrices may be held once, or for each."""
    want = want.to(param.dtype)
    if want.shape[-1:] == (1,) and want.dim() > param.dim():
        want = want.squeeze(-1)
    if param.dim() < want.dim():
        param = param.unsqueeze(-1)
    if param.dim() == 3 and param.shape[1] == 2 * want.shape[1]:  # the host keeps more of GPTQ's scales than it loads
        param = param[:, : want.shape[1]]
    return bool((param.float() == want.float()).all())


def told(model: Any, tensors: dict[str, Tensor]) -> str:
    model.wanted = None  # as if nothing had been loaded
    try:
        model.load_weights(tensors.items())
    except ConfigError as error:
        return str(error)
    return ""


def kv_scale(model: Any, tensors: dict[str, Tensor]) -> float | None:
    """What an attention layer holds of a scale that comes along; None if it has nothing for it."""
    scales = {f"model.layers.0.attention.{which}_scale": torch.tensor(0.5) for which in "kv"}
    assert told(model, tensors | scales) == ""
    held = model.model.layers[0].attention.attn.k_scale
    return None if held is None else held.item()


def without(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name != a_scale(tensors)}


def a_scale(tensors: dict[str, Tensor]) -> str:
    return next(name for name in sorted(tensors) if name.startswith(EXPERT) and "scale" in name)


def longer(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Matrices whose first part would fit."""
    names = [name for name in tensors if name.startswith((UP, EXPERT)) and tensors[name].dim() == 2]
    return tensors | {
        name: torch.cat((tensors[name].view(torch.uint8),) * 2).view(tensors[name].dtype) for name in names
    }


FAULTS = {
    "missing": without,
    "unknown": lambda tensors: tensors | {UP + "zero_point": torch.ones(3)},
    "longer": longer,
    "router": lambda tensors: tensors | {"model.layers.1.mlp.gate.weight_scale": torch.ones(4, 1)},
}


def widened(folder: Path) -> float:
    """Load a checkpoint on our CPU platform; how far the matrices that layers multiply by are from what they should be.

    As a share of the largest number of a matrix.
    """
    from sglang.srt.model_loader.loader import DefaultModelLoader

    meant = assembled(load_file(folder / "meant" / "model.safetensors"))
    model = built(folder)
    tensors = load_file(folder / "model.safetensors")
    DefaultModelLoader.load_weights_and_postprocess(model, tensors.items(), torch.device("cpu"))
    held: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        wide = getattr(module, "wide", None)
        if isinstance(wide, Tensor):
            held[f"{path}.weight"] = wide
        elif wide is not None:
            held |= {f"{path}.w13_weight": wide.w13_weight, f"{path}.w2_weight": wide.w2_weight}
    assert held.keys() == {name for name in meant if name.startswith("model.layers.") and is_quantised(name)}
    return max(
        ((wide.float() - meant[name]).abs().max() / meant[name].abs().max()).item() for name, wide in held.items()
    )


def is_quantised(name: str) -> bool:
    return "norm" not in name and ".mlp.gate." not in name and "layers.0.mlp." not in name


# --- in the test's process ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A checkpoint of each kind, and beside it the weights that it stands for."""
    made = [tmp_path_factory.mktemp("quantised") for _ in FORMATS]
    for how, folder in zip(FORMATS, made, strict=True):
        make_checkpoint(folder, **SIZES)
        meant = quantise(folder, how)
        check_files(folder)
        (folder / "meant").mkdir()
        save_file(meant, folder / "meant" / "model.safetensors")
    return made


@pytest.fixture(scope="module")
def loaded(folders: list[Path]) -> dict[str, dict[str, Any]]:
    """For each kind what became of it."""
    return dict(zip(FORMATS, in_a_process(placed, folders, HOPPER), strict=True))


@pytest.mark.parametrize("how", FORMATS)
def test_every_tensor_lands_in_its_place(how: str, loaded: dict[str, dict[str, Any]]) -> None:
    found = loaded[how]
    print(how, found["methods"])
    assert found["misplaced"] == [] and found["from nowhere"] == [] and found["misplaced in halves"] == [[], []]
    assert found["router"] == {"torch.float32"}
    assert found["KV scale"] == (
        0.5 if how in ("block FP8", "ModelOpt NVFP4") else None
    )  # the others' methods have none


@pytest.mark.parametrize("how", FORMATS)
def test_what_is_missing_unknown_or_misshapen_is_named(how: str, loaded: dict[str, dict[str, Any]]) -> None:
    said = loaded[how]["told"]
    assert f"missing tensor {EXPERT}" in said["missing"]
    assert f"unknown tensor {UP}zero_point [3]" in said["unknown"]
    assert "unknown tensor model.layers.1.mlp.gate.weight_scale" in said["router"]
    assert UP in said["longer"] and EXPERT in said["longer"]


def test_on_a_cpu_layers_multiply_by_what_matrices_stand_for(folders: list[Path]) -> None:
    off = dict(zip(FORMATS, in_a_process(widened, folders, None), strict=True))
    print({how: f"{share:.4f}" for how, share in off.items()})
    assert max(off.values()) < 0.01  # bf16, twice where scales are in 16 bits


QUESTIONS = 80
LOST = 6  # of them that four bits may cost; eight bits, fp32 activations or none are nearer
FP8_KV = ("--kv-cache-dtype", "fp8_e4m3")
SERVED = {  # of what the checkpoint is, and with which flags it is served
    "plain": ("plain", ()),
    "plain, FP8 as it is loaded": ("plain", ("--quantization", "fp8")),
    "plain, FP8 KV cache": ("plain", FP8_KV),
    "compressed-tensors NVFP4, FP8 KV cache": ("compressed-tensors NVFP4", FP8_KV),
} | {how: (how, ()) for how in FORMATS}
ALWAYS = "compressed-tensors NVFP4, FP8 KV cache"


def right_answers(how: str, folder: Path, *flags: str) -> int:
    """Of 80 held-out questions to the trained checkpoint, stored in some way."""
    stored, more = SERVED[how]
    padded(TINY, folder)
    if stored != "plain":
        quantise(folder, stored)
    with serving(folder, folder / "log", *more, *flags) as server:
        chosen = list(islice(examples(1, held_out=True), QUESTIONS))
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        score = total(evaluate(by_server(server.url), tokenizer, chosen, {"algorithm": "threshold"}, 8))
    print(f"{how}: {score.exact} of {score.examples} right, {score.tokens / score.forwards:.1f} tokens per forward")
    return score.exact


@pytest.mark.parametrize("how", [how if how == ALWAYS else pytest.param(how, marks=pytest.mark.long) for how in SERVED])
def test_answers_are_right(how: str, tmp_path: Path) -> None:
    assert right_answers(how, tmp_path) >= QUESTIONS * 0.97 - LOST
