"""Server arguments of adapters (LoRA), and a look at those that a server starts with."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from sglang_llada.config import REPLAY_VARIABLE, read_switch
from sglang_llada.errors import ConfigError
from sglang_llada.host.backends import CPU_ADAPTERS, FEED_FORWARD, HOST_NAMES
from sglang_llada.host.hub import folder_of
from sglang_llada.llada2.adapters import Adapter, checked, read_adapter
from sglang_llada.llada2.config import Llada2Config
from sglang_llada.llada2.weights import headers

# Layers by the host's names, and those that are wrapped for them.
LAYERS = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "qkv_proj"), ("qkv_proj",)),
    "o_proj": ("o_proj",),
    **dict.fromkeys(("gate_proj", "up_proj", "gate_up_proj", "down_proj"), FEED_FORWARD),
}

logger = logging.getLogger(__name__)


def wants_adapters(args: Any) -> bool:
    """Whether a server has adapters."""
    return bool(args.lora_paths) if args.enable_lora is None else args.enable_lora


def places_experts(args: Any) -> bool:
    """Whether experts are copied or moved between ranks, so that the host's adapters would miss them."""
    return bool(args.enable_eplb or args.ep_num_redundant_experts or args.init_expert_location != "trivial")


def adapter_options(args: Any, model: Llada2Config) -> dict[str, Any]:
    """What the host must be told of adapters, if there are to be any.

    Raises:
        ConfigError: an adapter does not fit the model, or the host could not tell how much room they need.
    """
    if not wants_adapters(args):
        return {}
    if read_switch(os.environ, REPLAY_VARIABLE, default=False):
        raise ConfigError(f"{REPLAY_VARIABLE} is '1', and no CUDA graph has steps with adapters; leave out one of both")
    if not args.lora_paths and not args.max_lora_rank:
        raise ConfigError("--enable-lora without --lora-paths needs --max-lora-rank, by which room is set aside")
    room = layers(args.lora_target_modules) if args.lora_target_modules else None
    for name, path in paths(args.lora_paths or []):
        try:
            check_room(check_adapter(path, model), args.max_lora_rank, room)
        except ConfigError as error:
            raise ConfigError(f"--lora-paths {name}: {error}") from None
    logger.warning("CUDA graphs of steps are off, because there are adapters (LoRA)")
    chosen: dict[str, Any] = {"enable_lora": True, "disable_decode_cuda_graph": True}
    if room is not None or not args.lora_paths:
        chosen["lora_target_modules"] = sorted(layers(["all"]) if room is None else room)
    if args.device == "cpu":
        chosen["lora_backend"] = CPU_ADAPTERS
    return chosen


def layers(given: Iterable[str]) -> set[str]:
    """The layers that --lora-target-modules means.

    Raises:
        ConfigError: LLaDA2 does not have one of them, or takes no adapter there.
    """
    names = {*given}
    if names == {"all"}:
        names = {*LAYERS}
    if wrong := names - LAYERS.keys():
        allowed = f"all, or some of {', '.join(LAYERS)}"
        raise ConfigError(f"--lora-target-modules has {', '.join(sorted(wrong))}; allowed: {allowed}")
    return {layer for name in names for layer in LAYERS[name]}


def paths(given: Any) -> Iterator[tuple[str, str]]:
    """Names and paths of --lora-paths, in whatever form the host takes them."""
    if isinstance(given, dict):
        yield from given.items()
        return
    for each in given:
        if isinstance(each, str):
            name, _, path = each.partition("=")
            yield name, path or name
        elif isinstance(each, dict):
            yield each["lora_name"], each["lora_path"]
        else:
            yield each.lora_name, each.lora_path


def check_adapter(path: str, model: Llada2Config) -> Adapter:
    """Read what an adapter is; of one in a folder also look at its tensors' names and shapes."""
    folder = folder_of(path)
    adapter = read_adapter(folder)
    if Path(path).is_dir():
        checked(model, adapter, dict(headers(folder)))
    return adapter


def check_room(adapter: Adapter, max_rank: int | None, room: set[str] | None) -> None:
    """Raise ConfigError unless what the user sets aside for adapters, if anything, is enough for one."""
    if max_rank and adapter.rank > max_rank:
        raise ConfigError(f"its rank is {adapter.rank}; allowed: up to {max_rank}, as --max-lora-rank is")
    needed = layers(HOST_NAMES.get(name, name) for name in adapter.targets)
    if room is not None and (beside := needed - room):
        raise ConfigError(f"it has {', '.join(sorted(beside))}, which --lora-target-modules does not")
