"""Whether a model divides over the ranks of a server."""

from __future__ import annotations

from typing import Any

from sglang_llada.errors import ConfigError
from sglang_llada.llada2.config import Llada2Config


def check_split(args: Any, config: Llada2Config) -> None:
    """Raise ConfigError unless heads, experts and widths divide evenly over the ranks; the host replicates KV heads."""
    attention_ranks = args.dp_size if args.enable_dp_attention else args.attn_dp_size
    if args.tp_size % attention_ranks:
        raise ConfigError(f"{attention_ranks} ranks of DP attention do not divide --tp-size {args.tp_size}")
    attention = args.tp_size // attention_ranks
    ranks_per_expert = max(args.tp_size // args.ep_size, 1)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    rules = [
        (args.tp_size % args.ep_size == 0, f"--ep-size {args.ep_size} does not divide --tp-size {args.tp_size}"),
        (heads % attention == 0, f"{heads} attention heads do not divide over {attention} ranks"),
        (
            kv_heads % attention == 0 or attention % kv_heads == 0,
            f"{kv_heads} KV heads can be neither divided over {attention} ranks nor copied evenly to them",
        ),
        (
            config.num_experts % args.ep_size == 0,
            f"{config.num_experts} experts do not divide over {args.ep_size} ranks",
        ),
        (
            config.moe_intermediate_size % ranks_per_expert == 0,
            f"experts of width {config.moe_intermediate_size} do not divide over {ranks_per_expert} ranks",
        ),
        (
            config.shared_intermediate_size % args.tp_size == 0 and config.intermediate_size % args.tp_size == 0,
            f"feed-forward layers of width {config.intermediate_size} and {config.shared_intermediate_size} do not "
            f"divide over {args.tp_size} ranks",
        ),
    ]
    wrong = [message for holds, message in rules if not holds]
    if wrong:
        raise ConfigError("; ".join(wrong))
