"""What an earlier release that is supported lacks: one function for each name, which asks whether the host has it.

What each release lacks is in seam/releases/. A class of the host that needs more than a function has it where that
class is used: models/parts/topk.py. Once no release lacks a name, its function goes.
"""

from __future__ import annotations

from typing import Any


def names_http_app() -> bool:
    """Whether the app of several HTTP processes can be named: only one of ours loads the plugins there."""
    from sglang.srt.environ import envs

    return hasattr(envs, "SGLANG_HTTP_SERVER_APP_PATH")


def adds_adapters() -> bool:
    """Whether a backend of adapters (LoRA) adds them to a layer of any kind in one call, which ours has."""
    from sglang.srt.lora.backend.base_backend import BaseLoRABackend

    return hasattr(BaseLoRABackend, "forward_with_base")


def private_params() -> set[str]:
    """Names under which the host's endpoints write into a request's custom_params."""
    from sglang.srt.sampling import sampling_params

    names = ("REQUEST_REASONING_END_TOKEN_IDS_KEY", "REQUEST_REASONING_IN_GRAMMAR_KEY")
    return {getattr(sampling_params, name) for name in names if hasattr(sampling_params, name)}


def parses_without_tools(detector: Any) -> bool:
    """Whether a detector looks for calls in answers to requests that declare no tools."""
    return hasattr(detector, "parses_without_tools") and detector.parses_without_tools()


def send_abort_output(scheduler: Any, abort: Any, req: Any) -> None:
    """Answer a request of which there is no output to send."""
    if hasattr(scheduler, "send_abort_output"):
        scheduler.send_abort_output(abort, req)
    else:
        scheduler.ipc_channels.send_to_tokenizer.send_output(abort, req)
