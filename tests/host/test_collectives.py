"""What two real ranks exchange in a step is what `python -m bench.roofline` counts for any number of them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.roofline import collectives
from sglang_llada.blocks import Request, next_step
from sglang_llada.config import DecodeConfig
from sglang_llada.decode.layout import fresh, numbers
from tests.host.ranks import run_ranks
from tests.toy import MASK, make_checkpoint

pytestmark = [pytest.mark.host, pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.usefixtures("few_threads")]

T, ROWS = 32, 3
WIDTHS = {"intermediate_size": 128, "moe_intermediate_size": 64}  # multiples of 32 on each rank, as the host wants


class Exchanged(TorchDispatchMode):
    """Collectives, by name and by the bytes that this rank gives."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[tuple[str, int]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.name().removeprefix("c10d::")
            given = args[1] if name.startswith(("_allgather_base_", "allgather_")) else args[0]
            sizes = [t.numel() * t.element_size() for t in tree_leaves(given) if isinstance(t, Tensor)]
            self.seen[name, sum(sizes)] += 1
        return func(*args, **(kwargs or {}))


def exchanged(runner: Any) -> dict[str, Any]:
    """In a rank's process: what a greedy step exchanges, launch to read."""
    from sglang_llada.host.engine.executor import Decider, Executor

    executor = Executor(runner, Decider(runner))
    params, tokens = DecodeConfig.defaults(T), executor.decider.tokens
    requests = []
    for slot in range(ROWS):
        how: dict[str, Any] = {"mask_id": MASK, "fresh": fresh(T, tokens), "numbers": numbers(params)}
        requests.append(Request(f"r{slot}", [5, 6], 64, frozenset(), params, block_size=T, **how))
        requests[-1].slot = slot
        requests[-1].admit(0)
        begin = (1 + slot) * T  # page 0 is the host's, for padding
        runner.req_to_token_pool.req_to_token[slot, :T] = torch.arange(begin, begin + T)
    with torch.inference_mode(), Exchanged() as seen:
        executor.read(executor.launch(next_step(requests, 100)))
    return {"seen": dict(seen.seen)}


@pytest.mark.parametrize(
    "flags",
    [pytest.param(flags, marks=pytest.mark.long) for flags in ((), ("--ep-size", "2"))],
    ids=["tensor", "experts"],
)
def test_two_ranks_exchange_what_is_counted(flags: tuple[str, ...], tmp_path: Path) -> None:
    """Sums of hidden states after the embedding and twice a layer, and one record of each open position (fp32 here)."""
    config = make_checkpoint(tmp_path, **WIDTHS).config
    counted = collectives(config.num_hidden_layers, config.hidden_size, ROWS * T, ROWS * (T - 2), element=4)
    want: Counter[tuple[bool, int]] = Counter()
    for each in counted:
        want[each.reduces, each.size] += each.count
    for rank in run_ranks(exchanged, tmp_path, 2, *flags):
        seen: Counter[tuple[bool, int]] = Counter()
        for (name, size), count in rank["seen"].items():
            seen[name.startswith("allreduce"), size] += count
        assert seen == want
