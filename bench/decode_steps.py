"""Time of one decode step on this machine, ours against the host's own algorithms: `python -m bench.decode_steps`.

Rows of blocks in mid-decode and random logits of a whole vocabulary. `step` is what our step takes once selection has
given each position's best tokens; `with selection` adds their reduction from the same whole logits that the host's
steps are given, so that both sides do all of the work between logits and tokens. One line per algorithm, then one JSON
record.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.dllm.algorithm import algo_name_to_cls
from sglang.srt.dllm.config import DllmConfig
from torch import Tensor

from bench.records import new_record
from sglang_llada.config import DecodeConfig
from sglang_llada.decode import ALGORITHMS, levenshtein
from sglang_llada.decode.contract import Scores, StepOut, Tokens
from sglang_llada.decode.layout import fresh, numbers, record, unpack
from sglang_llada.decode.select import best

T, VOCABULARY = 32, 157_184
TOKENS = Tokens(mask=156_895, delete=156_930, split=156_931)
STOCK: dict[str, dict[str, dict[str, Any]]] = {
    "threshold": {"LowConfidence": {}},
    "joint_threshold": {"JointThreshold": {}, "JointThreshold, vectorized": {"vectorized_decoding": True}},
    "levenshtein": {"JointThresholdInDel": {}},
}


def main() -> None:
    """Print the table and the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    logits = torch.randn(args.rows * T, args.vocabulary, device=args.device) * 3
    ids = torch.randint(0, 1000, (args.rows, T), device=args.device)
    ids[:, T // 2 :] = TOKENS.mask
    out: dict[str, Any] = {
        **new_record(),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "rows": args.rows,
        "vocabulary": args.vocabulary,
        "milliseconds": {},
    }
    print(f"{args.rows} rows of {T}, vocabulary {args.vocabulary}, {out['device']}: milliseconds per step (median)")
    for name in ALGORITHMS:
        decide, choose = ours(name, ids, logits)
        scores = choose()
        times = {
            "step": timed(lambda decide=decide, scores=scores: decide(scores), args.repeats),  # type: ignore[misc]
            "with selection": timed(lambda decide=decide, choose=choose: decide(choose()), args.repeats),  # type: ignore[misc]
        }
        for stock, options in STOCK[name].items():
            times[stock] = timed(stocks(stock.split(",")[0], options, ids, logits), args.repeats)
        out["milliseconds"][name] = times
        print(f"  {name:<16}" + "; ".join(f"{what} {value:.2f}" for what, value in times.items()))
    print(json.dumps(out))


def ours(name: str, ids: Tensor, logits: Tensor) -> tuple[Callable[[Scores], StepOut], Callable[[], Scores]]:
    """An algorithm's step on the rows, and what gives it its scores."""
    params = DecodeConfig.defaults(T, name, indel=True)
    holes = (1 << T) - (1 << T // 2)  # the second half, as in main()
    editable = (1 << T // 2) - 1 if params.edits else 0
    row = record(holes, editable, numbers(params), fresh(T, TOKENS))
    table = torch.tensor([row] * len(ids), device=ids.device)
    block, state, unpacked, _ = unpack(ids.flatten(), table, T, TOKENS)
    count, masked = (levenshtein.CANDIDATES, -1) if ALGORITHMS[name].indel else (1, TOKENS.mask)

    def choose() -> Scores:
        found = best(logits, masked, count)
        token, prob = found.token.view(*ids.shape, -1), found.prob.view(*ids.shape, -1)
        return Scores(token[..., 0], prob[..., 0], token, prob)

    return lambda scores: ALGORITHMS[name].step(block, scores, state, unpacked), choose


def stocks(name: str, options: dict[str, Any], ids: Tensor, logits: Tensor) -> Callable[[], Any]:
    """A step of the host's on the same rows; its input is made anew each time, since it writes over it."""
    indel = {"delete_token_id": TOKENS.delete, "split_token_id": TOKENS.split}
    config = DllmConfig(name, options, T, TOKENS.mask, len(ids), **indel)
    algorithm = algo_name_to_cls[name](config)

    def step() -> Any:
        batch = SimpleNamespace(
            input_ids=ids.flatten().clone(),
            batch_size=len(ids),
            dllm_prompt_mask=torch.zeros_like(ids, dtype=torch.bool),
        )
        return algorithm.step(batch, logits, algorithm.init_step_state(batch))

    return step


def timed(work: Callable[[], Any], repeats: int) -> float:
    """Median milliseconds of a call, after one that does not count."""
    times = []
    for _ in range(repeats + 1):
        synchronize()
        begin = time.perf_counter()
        work()
        synchronize()
        times.append(1e3 * (time.perf_counter() - begin))
    return median(times[1:])


def synchronize() -> None:
    """Wait for the device, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
