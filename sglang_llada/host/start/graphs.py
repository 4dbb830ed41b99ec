"""Server arguments of CUDA graphs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sglang_llada.config import DEFAULT_MAX_RUNNING_REQUESTS
from sglang_llada.host.facts import row_budget


def graph_options(args: Any, block_size: int) -> dict[str, Any]:
    """Which CUDA graphs to capture, unless the user says: steps of up to two rows for each request that may run.

    The host would stop at one row for each. Its graphs of prefills are off: they are made for causal prefills.
    """
    chosen: dict[str, Any] = {"disable_prefill_cuda_graph": True}
    if args.cuda_graph_bs_decode or args.cuda_graph_max_bs_decode or args.cuda_graph_config:
        return chosen
    running = args.max_running_requests or DEFAULT_MAX_RUNNING_REQUESTS
    most = min(2 * running, row_budget(args.chunked_prefill_size, block_size))
    if args.device == "cpu":  # where graphs are a test: few sizes will do
        return chosen | {"cuda_graph_bs_decode": [*powers_of_two(most), most]}
    return chosen | {"cuda_graph_max_bs_decode": most}


def powers_of_two(below: int) -> Iterator[int]:
    """1, 2, 4, ... while less than `below`."""
    power = 1
    while power < below:
        yield power
        power *= 2


def captures_prefills(args: Any) -> bool:
    """Whether the user asks for CUDA graphs of prefills."""
    config = args.cuda_graph_config or {}
    in_config = config.get("prefill", {}).get("backend") if isinstance(config, dict) else config.prefill.backend
    return {args.cuda_graph_backend_prefill, in_config} - {None, "disabled"} != set()
