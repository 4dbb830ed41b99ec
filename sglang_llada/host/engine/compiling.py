"""Our kernels are compiled by a process of their own while the weights are loaded (kernels.py says how)."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from dataclasses import astuple
from threading import Thread
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.arg_groups.model_override_base import resolving_view
from sglang.srt.platforms import current_platform
from sglang.srt.runtime_context import get_parallel, get_server_args

from sglang_llada.card import card_of
from sglang_llada.config import COMPILE_VARIABLE, read_switch
from sglang_llada.host.backends import ATTENTION_BACKEND
from sglang_llada.host.engine.executor import tokens_of
from sglang_llada.host.facts import facts_of, is_ours
from sglang_llada.llada2.router import PARTS

if TYPE_CHECKING:
    from sglang_llada.host.models.llada2 import LLaDA2MoeModelLM

MODULE = "sglang_llada.kernels"
FP8 = {"fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}  # --kv-cache-dtype in torch's names

logger = logging.getLogger(__name__)

Launches = list[tuple[str, dict[str, Any]]]


def compile_beside(model: Any, model_config: Any, *_: Any, **__: Any) -> Any:
    """Have the kernels of a model compiled whose weights are to be loaded; `model` as it is."""
    if is_wanted():
        try:
            card = card_of(torch.device("cuda", torch.cuda.current_device()))
            begin({"card": card, "launches": launches_of(model, model_config)})
        except Exception as error:  # a server can do without
            tell_failure(f"{type(error).__name__}: {error}")
    return model


def is_wanted() -> bool:
    """Whether this process has a model of ours on a GPU, and is the first of its node's."""
    args = resolving_view(get_server_args())
    return (
        is_ours(args)
        and current_platform.is_cuda()
        and get_parallel().tp_rank % (args.tp_size // args.nnodes) == 0
        and read_switch(os.environ, COMPILE_VARIABLE, default=True)
    )


def launches_of(model: LLaDA2MoeModelLM, model_config: Any) -> Launches:
    """The kernels that this rank will launch, as kernels.LAUNCHES has them."""
    from sglang_llada.host.models.llada2 import MoE  # with all layers, which only a process with a model needs

    args, c = resolving_view(get_server_args()), model.config
    facts = facts_of(model_config.model_path, model_config.revision)
    attention, head = model.model.layers[model.start_layer].attention, model.head
    dtype, stored = name_of(model_config.dtype), FP8.get(args.kv_cache_dtype)
    heads = {"heads": attention.heads, "kv_heads": attention.kv_heads, "width": attention.head_dim, "dtype": dtype}
    launches: Launches = []
    if stored is None:
        launches.append(("rotate", {**heads, "rotated": c.rotary_dim}))
    if args.attention_backend == ATTENTION_BACKEND:
        launches.append(("attend", {**heads, "block_size": facts.block_size, "kv_dtype": stored or dtype}))
    experts = {"experts": c.num_experts, "top_k": c.num_experts_per_tok, "normalise": c.norm_topk_prob}
    moe = next((layer.mlp for layer in model.model.layers if isinstance(layer.mlp, MoE)), None)
    if moe is not None and c.expert_capacity is not None:
        launches.append(("route_blocks", {**experts, "block_size": c.block_size, "capacity": c.expert_capacity}))
    elif moe is not None and moe.groups is not None and model_config.dtype is torch.bfloat16:
        groups = {"groups": c.n_group, "top_groups": c.topk_group}
        launches.append(("route", {**experts, **groups, "parts": PARTS, "shared": moe.shared_weight}))
    deciding = {
        "block_size": facts.block_size,
        "tokens": astuple(tokens_of(facts)),
        "width": c.hidden_size,
        "rows": len(head.weight),
        "vocabulary": head.vocabulary,
        "ranks": model.lm_head.tp_size,
        "invariant": head.invariant,
        "dtype": name_of(head.weight.dtype),
    }
    return [*launches, ("decide", deciding)]


def name_of(dtype: torch.dtype) -> str:
    """Its name in torch."""
    return str(dtype).removeprefix("torch.")


def begin(request: dict[str, Any]) -> None:
    """Start the process, apart from signals that are meant for the server, and say how it ended when it has."""
    process = subprocess.Popen(
        [sys.executable, "-m", MODULE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},  # it would take memory that the host is about to measure
        start_new_session=True,
    )
    Thread(target=tell, args=(process, json.dumps(request)), daemon=True, name="kernels").start()


def tell(process: subprocess.Popen[str], request: str) -> None:
    """Wait for it, and say how it ended."""
    said, wrong = process.communicate(request)
    if process.returncode == 0:
        logger.info("kernels: %s", said.strip())
    else:
        tell_failure(wrong.strip().rpartition("\n")[2] or f"status {process.returncode}")


def tell_failure(why: str) -> None:
    """What that means for the server."""
    logger.warning("kernels are compiled when they are first launched: compiling them before failed: %s", why)
