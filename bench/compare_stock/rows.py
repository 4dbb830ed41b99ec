"""The table: what is asked of both sides, by which probe, of a server under which setting."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.compare_stock import answers, keeping, starts
from bench.compare_stock.sides import Seen, Setting, Target

MANY = ("--max-running-requests", "64", "--enable-metrics", "--enable-cache-report")
PLAIN = (*MANY, "--enable-custom-logit-processor", "--constrained-json-disable-any-whitespace")
RANKS = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1", "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}


def settings(folder: Path) -> dict[str, Setting]:
    """How servers are started, by name, the first one for most rows; a folder for files that some of them need."""
    one_a_step = folder / "one_a_step.yaml"
    one_a_step.write_text("threshold: 1.0\n", encoding="utf-8")
    return {
        "plain": Setting(flags=PLAIN),
        "slow": Setting(flags=(*MANY, "--dllm-algorithm-config", str(one_a_step))),
        "2.1": Setting(starts.EDITING, MANY, ("--dllm-algorithm", "JointThreshold")),
        "2.2": Setting(starts.INSERTING, MANY, ("--dllm-algorithm", "JointThresholdInDel")),
        "small pool": Setting(flags=(*MANY, "--max-total-tokens", str(starts.SMALL_POOL))),
        "adapters": Setting(flags=(*MANY, "--enable-lora", "--lora-paths", f"double={starts.DOUBLE}")),
        "two ranks": Setting(flags=(*MANY, "--tp-size", "2"), env=RANKS),
        "damaged": Setting(starts.damage(folder / "damaged"), MANY),
    }


@dataclass(frozen=True, slots=True)
class Row:
    """What is asked, in words for whoever reads the table.

    Attributes:
        turns: how often, the sides in turn; the table has the medians of what was measured.
    """

    asked: str
    probe: Callable[[Target], Seen]
    setting: str = "plain"
    turns: int = 1


ROWS: dict[str, Row] = {
    # decoding
    "greedy": Row("24 chats, 8 at once: greedy answers", answers.greedy),
    "chat": Row("12 chat completions", answers.chat),
    "prompt": Row("a prompt of 2,016 tokens, and one token", answers.prompt_forwards),
    "seal": Row("three blocks of an answer, one token a step", answers.block_forwards, "slow"),
    "threshold": Row("`threshold` of a request", answers.threshold),
    "unknown": Row("a parameter that nobody knows (`treshold`)", answers.unknown_parameter),
    "live": Row("three live blocks", answers.live_blocks),
    "canvas": Row("an answer of which a part is given", answers.canvas),
    "choices": Row("probabilities of choices", answers.choices),
    "score": Row("`/v1/score`", answers.score),
    # sampling
    "temperature": Row("six answers at temperature 5", answers.temperature),
    "seeds": Row("seeds", answers.seeds),
    "cut": Row("top-k, top-p and min-p that leave one token", answers.truncation),
    "n": Row("`n` of 4 at temperature 5", answers.copies),
    "penalties": Row("`frequency_penalty` of 2", answers.penalty),
    "bias": Row("three tokens banned by bias", answers.bias),
    "least": Row("`min_new_tokens`", answers.least_tokens),
    "processor": Row("three tokens banned by a custom logit processor", answers.processor),
    # what comes back
    "logprobs": Row("log-probabilities of an answer", answers.log_probabilities),
    "prompt logprobs": Row("log-probabilities of a prompt", answers.prompt_log_probabilities),
    "stop": Row("a stop string, one token a step", answers.stop_text, "slow"),
    "stop token": Row("a stop token, one token a step", answers.stop_token, "slow"),
    "pieces": Row("a stream of 96 tokens, one a step", answers.pieces, "slow"),
    "steps": Row("the step of each token, the forwards of each block", answers.steps_of_tokens),
    "snapshots": Row("a stream of what stands after each step", answers.snapshots),
    # structured output
    "regex": Row("an answer by a regular expression", answers.regex),
    "schema": Row("an answer by a JSON schema", answers.schema),
    "ebnf": Row("an answer by an EBNF grammar", answers.ebnf),
    "tool": Row("a tool that has to be called", answers.tool_call),
    # what cannot be meant
    "bad id": Row("a token id of -1", answers.bad_id),
    "mask id": Row("the mask's id in a prompt", answers.mask_id),
    "typed mask": Row("the mask token typed by a user", answers.typed_mask),
    "bad regex": Row("a malformed `stop_regex`", answers.bad_regex),
    # what is kept, and given back
    "repeated": Row("a prompt for the second time: cached", keeping.repeated_prompt),
    "second turn": Row("a second turn: cached", keeping.second_turn),
    "shared": Row("8 requests at once behind one prompt of 960 tokens", keeping.shared_prompt),
    "leavers": Row("6 clients that leave: their pages", keeping.leavers),
    "abort": Row("6 requests aborted: their pages", keeping.aborted),
    "pause": Row("a pause in the middle of an answer", keeping.paused, "slow"),
    "weights": Row("new weights from disk", keeping.weights),
    "metrics": Row("metrics", keeping.metrics),
    # other servers
    "2.1": Row("LLaDA2.1: 12 answers that edit", starts.edits, "2.1"),
    "2.2": Row("LLaDA2.2: 12 answers that insert and delete", starts.inserts, "2.2"),
    "pool": Row("16 answers in a pool for 5 of them (`--max-total-tokens`)", starts.full_pool, "small pool"),
    "adapter": Row("an adapter (LoRA)", starts.adapter, "adapters"),
    "ranks": Row("12 answers of two ranks (`--tp-size 2`)", starts.two_ranks, "two ranks"),
    "damaged": Row("a checkpoint with a tensor missing and one too many", starts.bad_files, "damaged"),
    # figures
    "first token": Row("first token behind a prompt of 2,016 tokens", keeping.first_token, turns=3),
    "1": Row("chats, 1 at a time", keeping.speed(1, 16), turns=3),
    "8": Row("chats, 8 at a time", keeping.speed(8, 64), turns=3),
    "32": Row("chats, 32 at a time", keeping.speed(32, 192), turns=3),
}
