"""Adapters (LoRA) of LLaDA2 in the host's manager, pool and layers; put in place of the host's class by the plugin.

The host prepares adapters for its batches of requests; here a row stands for a request, and the executor says which
adapter each has. What the host knows modules by are the names of other models: adapters come under the checkpoint's
names, are held against the network (llada2/adapters.py), and go on under the host's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.utils import get_layer_id
from sglang.srt.lora.lora_manager import LoRAManager
from sglang.srt.utils import replace_submodule
from torch import Tensor, nn

from sglang_llada.host.backends import FEED_FORWARD, HOST_NAMES
from sglang_llada.host.hub import folder_of
from sglang_llada.llada2.adapters import adapter_of, checked
from sglang_llada.llada2.config import ARCHITECTURE
from sglang_llada.llada2.weights import read_tensors

HALVES = ("gate_proj", "up_proj")


class RowAdapters(LoRAManager):
    """The adapters of a model of ours; of any other the host's."""

    def __new__(cls, base_model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """This class stands in for the host's whatever the model."""
        ours = type(base_model).__name__ == ARCHITECTURE
        return super().__new__(cls) if ours else cls.__base__(base_model, *args, **kwargs)  # type: ignore[misc]

    def __init__(self, base_model: Any, *args: Any, **kwargs: Any) -> None:
        # By this the pool knows that there are feed-forward parts beside routed experts; dense layers are such, too.
        base_model.config.n_shared_experts = 1
        with unpinned(base_model):
            super().__init__(base_model, *args, **kwargs)

    def init_lora_modules(self) -> None:
        """Wrap the layers that adapters may have, under the host's names for them."""
        self.lora_modules: list[dict[str, nn.Module]] = [{} for _ in range(self.base_hf_config.num_hidden_layers)]
        self.embed_tokens_module = self.lm_head_module = None
        for path, module in list(self.base_model.named_modules()):
            name = renamed(path)
            target = name.rpartition(".")[2]
            if isinstance(module, FusedMoE):
                wraps = self.target_modules.issuperset(FEED_FORWARD)
            else:
                wraps = isinstance(module, LinearBase) and target in self.target_modules
            if wraps:
                self.lora_modules[get_layer_id(path)][name] = self.set_lora_module(path, module)

    def set_lora_module(self, module_name: str, module: nn.Module, **kwargs: Any) -> nn.Module:
        """Put the layer with adapters in the place of a layer; returns it."""
        if not isinstance(module, FusedMoE):
            wrapper: nn.Module = super().set_lora_module(module_name, module)
        elif self.device.type == "cpu":
            from sglang_llada.host.cpu.adapters import ExpertsWithAdapters

            wrapper = replace_submodule(self.base_model, module_name, ExpertsWithAdapters(module, self.lora_backend))
        else:
            wrapper = super().set_lora_module(module_name, module, max_lora_rank=self.max_lora_rank)
        return wrapper

    def validate_new_adapter(self, lora_config: Any, lora_ref: Any) -> None:
        """As the host; ConfigError if adapter_config.json says more than that it is an adapter of this network."""
        lora_config.target_modules = host_targets(adapter_of(lora_config.hf_config).targets)
        super().validate_new_adapter(lora_config, lora_ref)

    def load_lora_weights(self, lora_ref: Any) -> None:
        """Read an adapter's tensors."""
        folder = folder_of(lora_ref.lora_path, patterns=["*.safetensors"])
        self.load_lora_weights_from_tensors(lora_ref, dict(read_tensors(folder)))

    def load_lora_weights_from_tensors(self, lora_ref: Any, tensors: Mapping[str, Tensor]) -> None:
        """Hold an adapter's tensors against the network, and hand them over; ConfigError if they do not fit."""
        adapter = adapter_of(self.configs[lora_ref.lora_id].hf_config)
        found = checked(self.base_hf_config, adapter, tensors)
        super().load_lora_weights_from_tensors(lora_ref, host_tensors(found))


def unpinned(model: nn.Module) -> Any:
    """Memory is pinned where there is a device that is copied to."""
    if next(model.parameters()).device.type != "cpu":
        return nullcontext()
    from sglang_llada.host.cpu.adapters import Unpinned

    return Unpinned()


def host_targets(targets: Iterable[str]) -> list[str]:
    """The host's names of modules, which are given by the checkpoint's; of feed-forward parts all."""
    names = {HOST_NAMES.get(name, name) for name in targets}
    attention = names & {*HOST_NAMES.values()}
    return sorted(attention if names == attention else attention.union(FEED_FORWARD))


def host_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An adapter's tensors by the host's names; a half of a fused matrix that it leaves as it is is zero."""
    found = {}
    for name, tensor in tensors.items():
        module, half, leaf = name.rpartition(".lora_")
        found[f"{renamed(module)}{half}{leaf}"] = tensor
        path, _, last = module.rpartition(".")
        if last in HALVES:
            for other in HALVES:
                found.setdefault(f"{path}.{other}{half}{leaf}", torch.zeros_like(tensor))
    return found


def renamed(module: str) -> str:
    """The host's name of a module."""
    path, dot, last = module.rpartition(".")
    return f"{path}{dot}{HOST_NAMES.get(last, last)}"
