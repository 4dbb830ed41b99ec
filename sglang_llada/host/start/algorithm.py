"""How our decode algorithms look to the host: names that --dllm-algorithm resolves, never code that it runs."""

from __future__ import annotations

from typing import Any

from sglang.srt.dllm.algorithm import algo_name_to_cls
from sglang.srt.dllm.algorithm.base import DllmAlgorithm

from sglang_llada.config import FLAGS
from sglang_llada.errors import IntegrityError
from sglang_llada.host.backends import ATTENTION_BACKENDS
from sglang_llada.host.facts import own_flag
from sglang_llada.llada2.config import ARCHITECTURE


class OwnAlgorithm(DllmAlgorithm):
    """Tells the host that the model is block diffusion and on which attention backends it may run."""

    supported_architectures = (ARCHITECTURE,)
    # The host leaves these as they are; any other becomes flashinfer when CUDA graphs are on.
    supported_attention_backends = ATTENTION_BACKENDS

    def run(self, model_runner: Any, forward_batch: Any, algo_states: Any = None) -> Any:
        raise IntegrityError("the host's worker was told to decode a block; only our scheduler may")


def register_algorithms() -> None:
    """Make --dllm-algorithm resolve our names. An alias keeps the host's class, which other architectures use."""
    for flag in FLAGS:
        if own_flag(flag) == flag:
            algo_name_to_cls[flag] = OwnAlgorithm
