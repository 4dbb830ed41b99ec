"""Steps on a GPU, side by side: `python -m bench.gpu_steps`, one to two minutes for each side.

A model of LLaDA2.0-mini's shape with random weights, whose best tokens never pass the threshold: one token a step, so
tokens a second of one request are steps a second. Prompts of 256 tokens, 128 new ones. Each side is the host's plain
launch command: `ours`, `after` (ours, each step launched when the last one is read), `off` (the host's own code).
Then the time to the first token of long prompts, sampled requests beside greedy ones, and with --profile what the
device did in 16 steps. The host fills random weights with numbers near zero; read the times, not the tokens.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import shutil
import tempfile
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import requests

from bench.load import Ask, Reply, closed_loop
from bench.records import ROOT, new_record
from tests.host.serving import launch, ready, stop, tail

SIDES = {"ours": {}, "after": {"SGLANG_LLADA_AHEAD": "0"}, "off": {"SGLANG_LLADA": "off"}}
TINY = ROOT / "examples" / "tiny-llada2"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
SHAPE = ROOT / "tests" / "published" / "LLaDA2.0-mini.config.json"
PROMPT, NEW, LONG = 256, 128, (1024, 4096)
SAMPLED = {"temperature": 1.0, "top_p": 0.9}
PROFILED = 16  # steps


def main(argv: list[str] | None = None) -> int:
    """Print a line per figure and, last, the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=["ours", "off"])
    parser.add_argument("--requests", nargs="+", type=int, default=[1, 8, 32, 64], help="at once")
    parser.add_argument("--model", type=Path, help="a folder; else one of LLaDA2.0-mini's shape is made")
    parser.add_argument("--profile", nargs="*", type=int, default=[], help="profile that many requests at once")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="further flags of the server; last")
    args = parser.parse_args(argv)
    out: dict[str, Any] = {**new_record(), "summary": {}}
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or shaped(Path(folder) / "mini")
        for side in args.sides:
            with server(model, side, Path(folder) / "log", args.flags) as (url, seconds):
                found = out["summary"][side] = {"start_s": seconds}
                print(f"{side:6} ready after {seconds:.0f} s", flush=True)
                found |= measure(url, side, args.requests)
                for at_once in args.profile:
                    found[f"profile of {at_once}"] = profile(url, side, at_once, Path(folder) / f"{side}-{at_once}")
    print(json.dumps(out))
    return 0


def shaped(folder: Path) -> Path:
    """A folder with LLaDA2.0-mini's config.json, the small tokenizer and no weights."""
    folder.mkdir()
    for name in TOKENIZER:
        shutil.copy(TINY / name, folder)
    shutil.copy(SHAPE, folder / "config.json")
    return folder


@contextmanager
def server(model: Path, side: str, log: Path, flags: list[str]) -> Any:
    """A server's address and the seconds it took to be ready."""
    weights = () if (model / "model.safetensors.index.json").exists() else ("--load-format", "dummy")
    begin = time.perf_counter()
    common = ("--max-running-requests", "64", *weights, *flags)
    process, url = launch(model, log, *common, env={**SIDES[side], "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "0"})
    try:
        ready(process, url, log)
        yield url, time.perf_counter() - begin
    except BaseException:
        print(tail(log, 6000), flush=True)
        raise
    finally:
        stop(process)


def measure(url: str, side: str, sizes: list[int]) -> dict[str, Any]:
    """Tokens a second and milliseconds a step at each size, first tokens, sampled against greedy."""
    rng, found = random.Random(0), {}

    def load(count: int, at_once: int, new: int = NEW, length: int = PROMPT, **sampling: Any) -> list[Reply]:
        prompts = [[rng.randrange(20, 250) for _ in range(length)] for _ in range(count)]
        if sampling:
            with ThreadPoolExecutor(at_once) as pool:
                return list(pool.map(lambda ids: whole(url, ids, new, sampling), prompts))
        return closed_loop(url, [Ask(ids, new, ignore_eos=True) for ids in prompts], at_once)

    def speed(name: str, at_once: int, **sampling: Any) -> None:
        begin = time.perf_counter()
        replies = load(at_once * (2 if at_once < 64 else 1), at_once, **sampling)
        tokens_s = sum(reply.tokens for reply in replies) / (time.perf_counter() - begin)
        nfe = median(last(reply.meta.get("dllm_nfe")) for reply in replies)
        found[name] = {"tokens_s": tokens_s, "ms_per_token": 1e3 * at_once / tokens_s, "nfe": nfe}
        print(
            f"{side:6} {name:16} {tokens_s:8.1f} tokens/s {1e3 * at_once / tokens_s:7.2f} ms a step, nfe {nfe}",
            flush=True,
        )

    load(2, 1, 32)
    for at_once in sizes:
        speed(f"{at_once} at once", at_once)
    for length in LONG:
        times = [load(1, 1, 32, length)[0].first for _ in range(3)]
        found[f"first token of {length}"] = {"ms": [1e3 * each for each in times]}
        print(f"{side:6} first token of {length}: {', '.join(f'{1e3 * each:.0f}' for each in times)} ms", flush=True)
    if side != "off":  # which takes no temperature
        load(8, 8, 8, **SAMPLED)
        speed("8 sampled", 8, **SAMPLED)
    return found


def whole(url: str, ids: list[int], new: int, sampling: dict[str, Any]) -> Reply:
    """One request that is not streamed."""
    reply = Reply(time.perf_counter())
    body = {"input_ids": ids, "sampling_params": {"max_new_tokens": new, "ignore_eos": True, **sampling}}
    answer = requests.post(url + "/generate", json=body, timeout=300)
    answer.raise_for_status()
    reply.meta = answer.json()["meta_info"]
    reply.events.append((time.perf_counter(), reply.meta["completion_tokens"]))
    return reply


def last(value: Any) -> float:
    """A count of meta_info; the host's own code gives none."""
    value = value[-1] if isinstance(value, list) else value
    return float(value or 0)


def profile(url: str, side: str, at_once: int, folder: Path) -> dict[str, Any]:
    """What the device did while 16 steps ran under load: share of time it was idle, kernels, copies, largest names."""
    rng = random.Random(1)
    asks = [Ask([rng.randrange(20, 250) for _ in range(PROMPT)], NEW, ignore_eos=True) for _ in range(at_once)]
    with ThreadPoolExecutor(1) as beside:
        running = beside.submit(closed_loop, url, asks, at_once)
        time.sleep(0.5)
        body = {"output_dir": str(folder), "num_steps": PROFILED, "activities": ["CPU", "GPU"]}
        requests.post(url + "/start_profile", json=body, timeout=120).raise_for_status()
        running.result()
    deadline = time.monotonic() + 60
    while not (files := list(folder.rglob("*.json.gz"))) and time.monotonic() < deadline:
        time.sleep(0.5)
    time.sleep(2)
    found = summed(json.loads(gzip.decompress(files[0].read_bytes()))["traceEvents"])
    print(f"{side:6} profile of {at_once}: {found['ms_per_step']:.2f} ms a step, idle {100 * found['idle']:.0f} %, "
          f"{found['kernels_per_step']:.0f} kernels, copies {found['copies_per_step']:.1f}, "
          f"synchronisations {found['syncs_per_step']:.1f} a step")  # fmt: skip
    for name, each in found["largest"].items():
        print(f"       {each['ms_per_step']:7.3f} ms {each['count_per_step']:6.1f} x {name}", flush=True)
    return found


def summed(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Of a trace of PROFILED steps."""
    device = sorted(
        (e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")), key=lambda e: e["ts"]
    )
    begin, end, busy = device[0]["ts"], device[0]["ts"], 0.0
    for event in device:
        finish = event["ts"] + event["dur"]
        busy += max(finish - max(event["ts"], end), 0.0)
        end = max(end, finish)
    times: dict[str, float] = defaultdict(float)
    counts: Counter[str] = Counter()
    for event in device:
        times[event["name"][:90]] += event["dur"]
        counts[event["name"][:90]] += 1
    calls = Counter(e["name"] for e in events if e.get("cat") == "cuda_runtime")
    copies = sum(e["cat"] == "gpu_memcpy" and "DtoD" not in e["name"] for e in device)
    syncs = sum(count for name, count in calls.items() if "Synchronize" in name)
    largest = sorted(times, key=lambda name: -times[name])[:16]
    return {
        "ms_per_step": 1e-3 * (end - begin) / PROFILED,
        "idle": 1 - busy / (end - begin),
        "kernels_per_step": sum(e["cat"] == "kernel" for e in device) / PROFILED,
        "copies_per_step": copies / PROFILED,
        "syncs_per_step": syncs / PROFILED,
        "largest": {
            name: {"ms_per_step": 1e-3 * times[name] / PROFILED, "count_per_step": counts[name] / PROFILED}
            for name in largest
        },
    }


if __name__ == "__main__":
    raise SystemExit(main())
