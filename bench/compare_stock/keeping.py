"""Probes of what a server keeps, gives back and goes on with: caches, ends from outside, pauses, new weights, speed."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

from bench.compare_stock.right import COUNTING, exact, questions, tokenizer
from bench.compare_stock.sides import TINY, NotAnswered, Seen, Target
from bench.load import Ask, closed_loop
from bench.records import ROOT
from bench.serve import after, chats, summary

OTHER = ROOT / "examples" / "tiny-llada2.1"  # the same network and tokenizer, trained further
PATIENCE = 10.0  # for pages to come back
LONG_TOKENS = 2000  # of answers that are not waited for


# --- the prefix cache -------------------------------------------------------------------------------------------------


def cached(answer: Any) -> int:
    return int(answer["meta_info"]["cached_tokens"])


def repeated_prompt(target: Target) -> Seen:
    prompt = after(tokenizer(), 1000, seed=4)
    target.flush()
    target.generate(prompt, 4)
    found = cached(target.generate(prompt, 4))
    return Seen(f"{found} of 1,000 tokens", found == 992)


def second_turn(target: Target) -> Seen:
    prompt = after(tokenizer(), 40, seed=5)
    target.flush()
    answer = target.generate(prompt, 100, ignore_eos=True)["output_ids"]
    found = cached(target.generate([*prompt, *answer, *prompt[:20]], 4))
    return Seen(f"{found} of 140 tokens", found == 128)


def shared_prompt(target: Target) -> Seen:
    prompt = after(tokenizer(), 960, seed=6)
    target.flush()
    before = int(target.forwards[1])
    found = [cached(each) for each in target.together([([*prompt, 70 + i], 2, {}) for i in range(8)], 8)]
    rows = int(target.forwards[1]) - before
    return Seen(
        f"{sum(count == 960 for count in found)} of 7 find it cached; {rows} rows of 32 tokens run",
        sum(found) == 960 * 7,
    )


# --- ends from outside ------------------------------------------------------------------------------------------------


def free_again(target: Target) -> Seen:
    took = target.idle_after(PATIENCE)
    return Seen("still held after 10 s" if took is None else f"free after {took:.1f} s", took is not None)


def leavers(target: Target) -> Seen:
    for number in range(6):
        stream = target.stream([70 + number, 71], LONG_TOKENS, ignore_eos=True)
        next(stream)
        stream.close()
    return free_again(target)


def aborted(target: Target) -> Seen:
    with ThreadPoolExecutor(6) as pool:
        running = [pool.submit(target.generate, [70 + i, 71], LONG_TOKENS, ignore_eos=True) for i in range(6)]
        time.sleep(1)
        target.post("/abort_request", {"abort_all": True})
        reasons = [each.result()["meta_info"]["finish_reason"]["type"] for each in running]
    if reasons.count("abort") < len(reasons):
        return Seen(f"{reasons.count('abort')} of {len(reasons)} end", False)
    return free_again(target)


def paused(target: Target) -> Seen:
    asked: dict[str, Any] = {"prompt": [70, 71, 72], "new_tokens": 256, "ignore_eos": True}
    want, same = target.generate(**asked)["output_ids"], 0
    for mode in ("in_place", "retract"):
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(target.generate, **asked)
            time.sleep(0.05)
            target.post("/pause_generation", {"mode": mode})
            time.sleep(0.5)
            target.post("/continue_generation")
            try:
                same += answer.result()["output_ids"] == want
            except NotAnswered as error:
                return Seen(f"{mode}: {error}", False)
    return Seen(f"{same} of 2 ways to pause leave the answer as it is", same == 2)


def weights(target: Target) -> Seen:
    asked = questions(8, OTHER)
    target.post("/update_weights_from_disk", {"model_path": str(OTHER)})
    try:
        return exact(target, asked)
    finally:
        target.post("/update_weights_from_disk", {"model_path": str(TINY)})


def metrics(target: Target) -> Seen:
    before = target.metrics()
    tokens = target.generate(COUNTING, 64)["meta_info"]["completion_tokens"]
    after_it = target.metrics()
    counts = int(after_it["sglang:generation_tokens_total"] - before.get("sglang:generation_tokens_total", 0))
    own = [name for name in after_it if "tokens_per_forward" in name or "forwards_per_block" in name]
    said = f"{counts} tokens counted of {tokens}, {'and' if own else 'nothing of'} forwards of blocks"
    return Seen(said, counts == tokens and bool(own))


# --- speed ------------------------------------------------------------------------------------------------------------


def speed(at_once: int, count: int) -> Callable[[Target], Seen]:
    """A probe of chats, so many at once, from an empty cache."""

    def probe(target: Target) -> Seen:
        asks = list(islice(chats(tokenizer(), seed=at_once), count))
        run = measured(target, asks, at_once)
        return Seen("{:.0f} tokens/s; first token after {:.0f} ms", figures=(run["tokens/s"], run["TTFT p50"]))

    return probe


def first_token(target: Target) -> Seen:
    asks = [Ask(after(tokenizer(), 2016, seed=i), 8, ignore_eos=True) for i in range(2)]
    return Seen("{:.2f} s", figures=(measured(target, asks, 1)["TTFT p50"] / 1e3,))


def measured(target: Target, asks: list[Ask], at_once: int) -> dict[str, float]:
    """Figures of requests, as bench.serve has them."""
    target.flush()
    assert target.server is not None, "flush() has answered"
    return summary(asks, closed_loop(target.server.url, asks, at_once))
