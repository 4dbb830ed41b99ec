"""Answers of a server in bf16 against the reference decode in fp32: `python -m bench.exactness`.

Held-out questions to the small checkpoint that ships here, 16 at once. An answer that differs parts from the
reference's in one decision, and then it goes its own way; so a difference is explained where the reference, until it
was done with the block of the first token that differs, was as near to another decision as rounding to bf16 may be.
Prints how many answers are equal, how near the others were, and how many nothing explains.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from bench.gpu_steps import TINY
from bench.records import new_record
from sglang_llada.llada2.checkpoint import read_facts
from sglang_llada.llada2.reference import Generation, generate
from sglang_llada.llada2.weights import load_reference
from tests.host.conftest import held_out_prompts
from tests.host.serving import Server, serving

NEW_TOKENS = 40
NEAR = (
    0.1  # logits of this checkpoint are up to 20, which bf16 has in steps of 2^-4 and its layers round some ten times
)


def main(argv: list[str] | None = None) -> int:
    """Print the counts and, last, the record; 1 if some difference is not explained."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=58)
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.95, 0.5])
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="further flags of the server; last")
    args = parser.parse_args(argv)
    out: dict[str, Any] = {**new_record(), "summary": {}}
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(TINY, Path(folder) / "log", "--dtype", "bfloat16", *args.flags) as server,
    ):
        for threshold in args.thresholds:
            out["summary"][f"threshold {threshold}"] = compared(server, args.prompts, threshold)
    print(json.dumps(out))
    return int(any(each["not explained"] for each in out["summary"].values()))


def compared(server: Server, count: int, threshold: float) -> dict[str, Any]:
    """How many of so many answers at a threshold are the reference's, and how near the others were."""
    model, facts = load_reference(TINY), read_facts(TINY)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(TINY)
    prompts = list(held_out_prompts(tokenizer, [20 + 3 * n for n in range(count)]))
    options = {"mask_id": facts.mask_id, "stop_ids": facts.stop_ids, "threshold": threshold}
    wanted = [generate(model, prompt, NEW_TOKENS, **options) for prompt in prompts]
    got = server.generate_all(prompts, NEW_TOKENS, 16, custom_params={"threshold": threshold})
    near = []
    for prompt, want, answer in zip(prompts, wanted, got, strict=True):
        blocks = [(len(prompt) + i) // facts.block_size for i in range(len(want.token_ids))]
        near.append(nearness(want, answer["output_ids"], blocks))
    others = [each for each in near if each is not None]
    found = {
        "answers": count,
        "equal": near.count(None),
        "not explained": sum(each > NEAR for each in others),
        "nearness of the others": sorted(others),
    }
    print(
        f"threshold {threshold}: {found['equal']} of {count} answers equal; of the others the reference was within "
        f"{max(others, default=0.0):.3f} of another decision, {found['not explained']} not within {NEAR}",
        flush=True,
    )
    return found


def nearness(want: Generation, ids: list[int], blocks: list[int]) -> float | None:
    """How near the reference was to another decision, until it was done with the block of the first other token.

    `blocks`: of each place of the answer, the number of its block. None if no token is another one.
    """
    if ids == want.token_ids:
        return None
    pairs = zip(want.token_ids, ids, strict=False)
    first = next((i for i, (mine, other) in enumerate(pairs) if mine != other), len(want.token_ids) - 1)
    steps = dict.fromkeys(blocks, 0)
    for block, step in zip(blocks, want.step_map, strict=True):
        steps[block] = max(steps[block], step)
    last = blocks[-1]  # which may have taken steps for tokens that are cut off
    until = None if blocks[first] == last else sum(n for block, n in steps.items() if block <= blocks[first])
    return min(want.margins[:until])


if __name__ == "__main__":
    raise SystemExit(main())
