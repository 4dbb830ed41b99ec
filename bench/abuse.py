"""A server under hostile requests and good load at once: `python -m bench.abuse [--minutes 2] [--seed 0] [--tp 2]`.

A few good clients stream answers that are known beforehand, all the time (bench/good.py). Beside them phases without
and with hostile requests (bench/hostile.py) take turns, so that what those do to the pace of the good answers shows
whatever else the machine does. In the end nothing may have died, hung, changed or leaked: what did is listed, and the
exit status is 1. Tables by kind of hostile request and by phase, then one JSON record. A server at --url has to serve
the small checkpoint, too.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from urllib.parse import urlsplit

import requests
from transformers import PreTrainedTokenizerFast

from bench.good import Answer, good_load
from bench.hostile import AT_HOME, KINDS, Facts
from bench.load import Ask, Reply
from bench.records import ROOT, new_record
from bench.serve import quantile
from bench.shots import CUT, HUNG, REFUSED, Shot, fire
from sglang_llada.llada2.checkpoint import read_config, read_facts
from tests.host.conftest import Case, decoded, held_out_questions
from tests.host.serving import launch, ready, stop, tail

CHECKPOINT = ROOT / "examples" / "tiny-llada2"
FLAGS = ("--enable-metrics", "--enable-custom-logit-processor")
QUIET, HOSTILE = "quiet", "hostile"
PHASE_SECONDS, SETTLE_SECONDS = 10.0, 1.0
QUESTIONS, NEW_TOKENS, CLIENTS = 48, 64, 4
SLOWER = 1.5  # times as long as without hostile requests good clients may wait for a chunk, at the 99th percentile
# Shots: remembered; named before a death, which the host takes six seconds for; named of one kind with one fault.
KEPT, LAST, EXAMPLES = 500, 40, 3


@dataclass(frozen=True, slots=True)
class Window:
    """A phase, in seconds on the clock of all processes; `kinds` of hostile clients were there."""

    kinds: Sequence[str]
    begin: float
    end: float

    @property
    def names(self) -> tuple[str, ...]:
        """What its figures count for."""
        if not self.kinds:
            return (QUIET,)
        return (HOSTILE, *self.kinds) if len(self.kinds) == 1 else (HOSTILE,)


@dataclass(slots=True)
class Report:
    """What happened.

    Attributes:
        kinds: of each hostile kind how many shots came to what.
        pace: milliseconds of the good clients, by phase and figure.
        counts: good answers, and of those how many were exact, close calls or wrong.
        wrong: what must not be; empty if all is well.
    """

    kinds: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    pace: dict[str, dict[str, float]] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


def main(argv: list[str] | None = None) -> int:
    """Print the tables and the record; 1 if something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=2.0, help="of load, half of them hostile")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=3.0, help="hostile clients a second")
    parser.add_argument("--tp", type=int, default=1, choices=(1, 2))
    parser.add_argument("--url", help="a server that runs already; without the kinds " + ", ".join(AT_HOME))
    parser.add_argument("--only", type=listed, default=list(KINDS), metavar="KIND,KIND", help=", ".join(KINDS))
    parser.add_argument("--without", type=listed, default=[], metavar="KIND,KIND")
    parser.add_argument("--apart", action="store_true", help="one kind in each hostile phase: which one is to blame?")
    parser.add_argument("--log", type=Path, help="a file for every shot as it is sent, as lines of JSON")
    parser.add_argument("--server-log", type=Path, help="a file for what the server says")
    args = parser.parse_args(argv)
    without = {*args.without, *(AT_HOME if args.url else ())}
    if unknown := {*args.only, *args.without} - KINDS.keys():
        parser.error(f"no kinds: {', '.join(sorted(unknown))}; there are {', '.join(KINDS)}")
    kinds = [kind for kind in args.only if kind not in without]
    plan = Plan(kinds, args.minutes, args.seed, args.rate, args.apart)
    with (
        tempfile.TemporaryDirectory() as folder,
        serving_or(args.url, args.server_log, Path(folder), args.tp) as server,
    ):
        report = run(server, plan, Path(folder), args.log)
        show(report)
    figures = {"kinds": report.kinds, "good": report.pace, "answers": report.counts, "wrong": report.wrong}
    print(json.dumps({**new_record(), "seed": args.seed, "minutes": args.minutes, **figures}))
    return 1 if report.wrong else 0


def listed(text: str) -> list[str]:
    """Words between commas."""
    return text.split(",")


# --- a run ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Plan:
    """Which kinds of hostile clients, for how many minutes of phases, from which seed, and how many a second.

    apart: whether each hostile phase has one kind, in turn, instead of all.
    """

    kinds: Sequence[str]
    minutes: float
    seed: int = 0
    rate: float = 3.0
    apart: bool = False

    @property
    def rounds(self) -> list[Sequence[str]]:
        """The kinds of each hostile phase; a quiet one comes before it."""
        if self.apart:
            return [[kind] for kind in self.kinds]
        return [self.kinds] * max(1, round(self.minutes * 30 / PHASE_SECONDS))

    @property
    def phase_seconds(self) -> float:
        """How long each phase is."""
        return self.minutes * 30 / len(self.rounds)


@dataclass(frozen=True, slots=True)
class Target:
    """A server; with its process and its log if it is ours."""

    url: str
    process: subprocess.Popen[bytes] | None = None
    log: Path | None = None

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        parts = urlsplit(self.url)
        return parts.hostname or "127.0.0.1", parts.port or 80

    @property
    def dead(self) -> bool:
        """Whether it has ended."""
        return self.process is not None and self.process.poll() is not None


@contextmanager
def serving_or(url: str | None, log: Path | None, folder: Path, tp: int) -> Iterator[Target]:
    """The server at an address, or one of our own, which may end before the block does."""
    if url is not None:
        yield Target(url)
        return
    log = log or folder / "server"
    process, url = launch(CHECKPOINT, log, *FLAGS, "--tp-size", str(tp), module="bench.faulty_server")
    try:
        ready(process, url, log)
        yield Target(url, process, log)
    finally:
        stop(process)


def run(target: Target, plan: Plan, folder: Path, log: Path | None = None) -> Report:
    """Load in phases, then the checks."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(CHECKPOINT)
    chats = [messages for messages, _ in held_out_questions(QUESTIONS)]
    prompts = [
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False)
        for chat in chats
    ]
    cases = decoded(prompts, NEW_TOKENS, CHECKPOINT)
    facts = Facts(
        CHECKPOINT, read_facts(CHECKPOINT).vocab_size, read_config(CHECKPOINT).max_position_embeddings, folder
    )
    report = Report()
    with good_load(target.url, [Ask(case.prompt, NEW_TOKENS) for case in cases], CLIENTS) as good:
        windows = asyncio.run(Abuse(target, plan, facts, report, log).phases())
        answers = good.end()
    judge(answers, cases, report)
    pace(answers, windows, report)
    if not target.dead:
        check_idle(target, report)
    return report


class Abuse:
    """The phases of a run, and the hostile clients of some of them.

    Attributes:
        deck: the kinds that are still to come before any comes again.
        recent: the last shots, with when they were sent and of which kind they are.
        examples: how many shots of a kind were reported for an outcome.
    """

    def __init__(self, target: Target, plan: Plan, facts: Facts, report: Report, log: Path | None) -> None:
        self.target, self.plan, self.facts, self.report, self.log = target, plan, facts, report, log
        self.rng = random.Random(plan.seed)
        self.deck: list[str] = []
        self.recent: deque[tuple[float, str, Shot]] = deque(maxlen=KEPT)
        self.examples: Counter[tuple[str, str]] = Counter()

    async def phases(self) -> list[Window]:
        """All of them in turn, or fewer if the server dies or hangs; when each was."""
        windows: list[Window] = []
        await asyncio.sleep(2 * SETTLE_SECONDS)
        for i, hostile in enumerate(self.plan.rounds):
            for kinds in ((), hostile):
                progress(f"round {i + 1} of {len(self.plan.rounds)}, {'hostile' if kinds else 'quiet'}", self.report)
                await asyncio.sleep(SETTLE_SECONDS)
                begin = time.perf_counter()
                sent = await self._attack(kinds, begin + self.plan.phase_seconds)
                windows.append(Window(kinds, begin, time.perf_counter()))
                await asyncio.gather(*sent)
                if self.target.dead:
                    self.report.wrong.append(self._last_words())
                if self.target.dead or any(outcomes[HUNG] for outcomes in self.report.kinds.values()):
                    return windows
        return windows

    async def _attack(self, kinds: Sequence[str], end: float) -> list[asyncio.Task[None]]:
        """Send until then; the shots may go on after it."""
        sent = []
        while (left := end - time.perf_counter()) > 0 and not self.target.dead:
            if kinds:
                kind = self._drawn(kinds)
                for shot in KINDS[kind](self.rng, self.facts):
                    sent.append(asyncio.create_task(self._fire(kind, shot)))
            await asyncio.sleep(min(left, self.rng.expovariate(self.plan.rate)))
        return sent

    def _drawn(self, kinds: Sequence[str]) -> str:
        """One of them at random, and each before any comes again: a short run has all."""
        if not self.deck:
            self.deck = self.rng.sample(kinds, len(kinds))
        return self.deck.pop()

    async def _fire(self, kind: str, shot: Shot) -> None:
        at = time.perf_counter()
        self.recent.append((at, kind, shot))
        if self.log is not None:
            with self.log.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"time": time.time(), "kind": kind, "shot": shot.text}) + "\n")
        await fire(self.target.address, shot, lambda shot, outcome: self._note(at, kind, shot, outcome))

    def _note(self, at: float, kind: str, shot: Shot, outcome: str) -> None:
        """Count what came of a shot; a wrong outcome is reported unless the server's death explains it."""
        self.report.kinds[kind][outcome] += 1
        bad = outcome != str(shot.expected) if shot.expected else outcome in (HUNG, CUT, REFUSED) or is_error(outcome)
        if not bad or self.target.dead:
            return
        self.examples[kind, outcome] += 1
        if outcome == HUNG and self.examples.total() == 1:  # whoever is to blame came before it
            self.report.wrong.append(f"the server hung\n{self._sent_before(at)}")
        if self.examples[kind, outcome] <= EXAMPLES:
            self.report.wrong.append(f"{kind}: {outcome} for {shot.text}")

    def _last_words(self) -> str:
        assert self.target.process is not None and self.target.log is not None
        status, said = self.target.process.returncode, tail(self.target.log)
        return f"the server died with {status}\n{self._sent_before(time.perf_counter())}\nand it said\n{said}"

    def _sent_before(self, moment: float) -> str:
        shots = [each for each in self.recent if each[0] <= moment][-LAST:]
        lines = [f"  {moment - at:.1f} s earlier, {kind}: {shot.text}" for at, kind, shot in shots]
        return "\n".join(["the last shots until then were", *lines])


def is_error(outcome: str) -> bool:
    """Whether a status is an error of the server's; 501 says what it does not have."""
    return outcome[0] == "5" and outcome != "501"


# --- checks -----------------------------------------------------------------------------------------------------------


def judge(answers: Sequence[Answer], cases: Sequence[Case], report: Report) -> None:
    """Each good answer against the reference's; where that was too near to call, either is right."""
    for answer in answers:
        case, reply = cases[answer.number], answer.reply
        if reply is None:
            found = "none"
        elif case.close_call:
            found = "close call"
        else:
            same = (reply.token_ids, reply.meta["finish_reason"]["type"]) == (case.want.token_ids, case.want.finish)
            found = "exact" if same else "wrong"
        report.counts[found] += 1
        if found in ("none", "wrong") and report.counts[found] <= EXAMPLES:
            what = answer.error if reply is None else f"{reply.token_ids}, {reply.meta['finish_reason']}"
            report.wrong.append(f"good answer {found}: {what}; the reference has {case.want.token_ids}")
    if not report.counts["exact"]:
        report.wrong.append("no good answer is exact")


def pace(answers: Sequence[Answer], windows: Sequence[Window], report: Report) -> None:
    """What good clients waited for in the phases of each name, and how that compares to the quiet ones just before."""
    replies = [answer.reply for answer in answers if answer.reply is not None and answer.reply.events]
    for name in dict.fromkeys(name for window in windows for name in window.names):
        at = [i for i, window in enumerate(windows) if name in window.names]
        report.pace[name] = waits(replies, [windows[i] for i in at])
        if name == QUIET:
            continue
        before = waits(replies, [windows[i - 1] for i in at])
        report.pace[name]["times quiet"] = report.pace[name]["gap p99"] / before["gap p99"]
    slower = report.pace.get(HOSTILE, {}).get("times quiet", 0.0)
    if slower > SLOWER:
        report.wrong.append(f"good gaps are {slower:.2f} times as long at p99 in hostile phases; allowed: {SLOWER}")


def waits(replies: Sequence[Reply], windows: Sequence[Window]) -> dict[str, float]:
    """Milliseconds between chunks and until the first one; a wait counts for the phase that it began in."""
    inside = [(window, reply) for window in windows for reply in replies]
    gaps = [
        later - earlier
        for window, reply in inside
        for (earlier, _), (later, _) in pairwise(reply.events)
        if window.begin <= earlier < window.end
    ]
    firsts = [reply.first for window, reply in inside if window.begin <= reply.sent < window.end]
    gaps, firsts = sorted(gaps) or [math.inf], sorted(firsts) or [math.inf]
    return {
        "gap p50": 1e3 * quantile(gaps, 0.5),
        "gap p99": 1e3 * quantile(gaps, 0.99),
        "gap most": 1e3 * gaps[-1],
        "TTFT p50": 1e3 * quantile(firsts, 0.5),
        "TTFT p99": 1e3 * quantile(firsts, 0.99),
        "answers/s": sum(map(math.isfinite, firsts)) / sum(window.end - window.begin for window in windows),
    }


def check_idle(target: Target, report: Report) -> None:
    """Nothing is left of the load, and the server goes on."""
    deadline = time.monotonic() + 20
    while True:
        try:
            load = requests.get(target.url + "/v1/loads", timeout=20).json()["loads"][0]
            left = {name: load[name] for name in ("num_running_reqs", "num_waiting_reqs", "num_used_tokens")}
            left |= {f"queue {name}": count for name, count in load["queues"].items()}
            flushed = requests.post(target.url + "/flush_cache", timeout=20)
            well = requests.get(target.url + "/health_generate", timeout=60)
        except requests.RequestException as error:
            report.wrong.append(f"after the load: {error!r}")
            return
        if well.ok and flushed.ok and not any(left.values()):
            return
        if time.monotonic() > deadline:
            said = f"{left}, /flush_cache says {flushed.text[:200]!r}, /health_generate {well.status_code}"
            report.wrong.append(f"after the load: {said}")
            return
        time.sleep(0.5)


# --- what people see --------------------------------------------------------------------------------------------------


def progress(at: str, report: Report) -> None:
    """One line that is written over, if somebody looks."""
    if sys.stderr.isatty():
        shots = sum(sum(outcomes.values()) for outcomes in report.kinds.values())
        print(f"\r{at}: {shots} hostile requests so far", end="", file=sys.stderr, flush=True)


def show(report: Report) -> None:
    """The tables, and what is wrong."""
    print(f"\n{'hostile kind':<16}{'sent':>6}  came to")
    for kind, outcomes in sorted(report.kinds.items()):
        print(f"{kind:<16}{sum(outcomes.values()):>6}  {', '.join(f'{o} {n}' for o, n in sorted(outcomes.items()))}")
    print(f"\n{'good, ms':<16}" + "".join(f"{figure:>12}" for figure in max(report.pace.values(), key=len)))
    for name, phase in report.pace.items():
        print(f"{name:<16}" + "".join(f"{value:>12.1f}" for value in phase.values()))
    print("good answers:", ", ".join(f"{count} {what}" for what, count in sorted(report.counts.items())))
    for what in report.wrong:
        print(f"\nWRONG: {what}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
