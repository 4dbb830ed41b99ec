"""The hierarchical cache: who waits for a load, and that answers stay exact where KV was in host memory or in files."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests

from sglang_llada.blocks import Phase, Request, Table
from sglang_llada.config import REPLAY_VARIABLE
from tests.host.conftest import TINY, Case, compare, decoded
from tests.host.late import LONG_TURNS, MANY
from tests.host.serving import ROOT, Server, each_event, serving
from tests.sizes import size

pytestmark = pytest.mark.host

LATE = "tests.host.late"  # a server whose copies take time
FURTHER = ROOT / "examples" / "tiny-llada2.1"  # the same network, trained further
T = 32
POOL = 2048  # positions on the device
FLAGS = ["--enable-cache-report", "--enable-metrics", "--max-total-tokens", str(POOL)]
TIERS = ["--enable-hierarchical-cache", "--hicache-ratio", "10"]
FILES = ["--hicache-storage-backend", "file", "--hicache-storage-prefetch-policy", "wait_complete"]


# --- who waits --------------------------------------------------------------------------------------------------------


class Waiting:
    """Requests that are let in one by one, with a tree whose loads are done when it is said."""

    def __init__(self) -> None:
        self.ongoing: dict[int, None] = {}
        tree = SimpleNamespace(ongoing_load_back=self.ongoing, has_free_load_back_slot=lambda: False)
        host = SimpleNamespace(
            enable_hierarchical_cache=True,
            enable_hicache_storage=False,
            tree_cache=tree,
            _process_hicache_events=lambda: None,
        )
        from sglang_llada.host.engine.tiers import Tiers

        self.table = Table()
        self.tiers = Tiers(host, self.table, T)

    def request_of(self, prompt: list[int], cached: int, loaded: int = 0, node: int = 0, salt: str = "") -> Any:
        """A request of the host with so many positions cached, the last `loaded` in host memory, to come for `node`."""
        return SimpleNamespace(
            prefix_len=cached,
            last_node=node,
            extra_key=None,
            cache_salt=salt,
            full_untruncated_fill_ids=prompt,
            materialized_host_hit_len=lambda: loaded,
        )

    def admit(self, rid: str, prompt: list[int], cached: int, loaded: int = 0, node: int = 0, salt: str = "") -> Phase:
        """Let in a request, as request_of() makes it."""
        request = Request(rid, prompt, 8, frozenset(), None, T, 0)
        self.table.add(request)
        if loaded:
            self.ongoing[node] = None
        req = self.request_of(prompt, cached, loaded, node, salt)
        req.rid = rid
        self.table.readmit(rid, cached, loading=self.tiers.awaits(req))
        return request.phase

    def done(self, node: int) -> list[str]:
        """A load is done; who begins for it."""
        before = {request.rid for request in self.table if request.phase is Phase.LOADING}
        del self.ongoing[node]
        self.tiers.poll()
        return [request.rid for request in self.table if request.rid in before and request.phase is not Phase.LOADING]


def test_only_those_wait_whose_prefix_is_on_its_way() -> None:
    waiting = Waiting()
    same, other = [7] * 8 * T, [7] * 2 * T + [8] * 6 * T
    assert waiting.admit("loads", [*same, 1], 8 * T, loaded=6 * T, node=1) is Phase.LOADING
    assert waiting.admit("shares", [*same, 2], 8 * T) is Phase.LOADING
    assert waiting.admit("shares less", [*same, 2], 2 * T) is Phase.FILLING
    assert waiting.admit("shares what is there", [*other, 1], 8 * T) is Phase.DECODING
    assert waiting.admit("has another salt", [*same, 1], 8 * T, salt="s") is Phase.DECODING
    assert waiting.admit("loads more", [*same, *same, 3], 16 * T, loaded=8 * T, node=2) is Phase.LOADING
    assert waiting.done(1) == ["loads", "shares"]
    assert waiting.done(2) == ["loads more"]
    assert waiting.admit("comes late", [*same, *same, 4], 16 * T) is Phase.DECODING
    assert not waiting.tiers.loads and not waiting.tiers.awaited


def test_blocks_that_come_for_another_request_are_not_exchanged_for_ones_own() -> None:
    waiting = Waiting()
    waiting.admit("loads", [7] * 8 * T, 8 * T, loaded=6 * T, node=1)
    computes = waiting.request_of([*[7] * 6 * T, 1], cached=0)
    assert [waiting.tiers.is_loading(computes, upto) for upto in (2 * T, 3 * T)] == [False, True]
    assert not waiting.tiers.is_loading(waiting.request_of([*[7] * 2 * T, *[8] * T], cached=0), 3 * T)
    waiting.done(1)
    assert not waiting.tiers.is_loading(computes, 3 * T)


def test_a_request_that_ends_or_is_retracted_while_it_loads_waits_no_longer() -> None:
    waiting = Waiting()
    for rid, node in (("ends", 1), ("is retracted", 2), ("is let in again", 3)):
        waiting.admit(rid, [node] * 4 * T, 4 * T, loaded=4 * T, node=node)
    waiting.table.drop("ends")
    for rid in ("is retracted", "is let in again"):
        waiting.table[rid].retract()
    waiting.table.readmit("is let in again", 0)
    assert [waiting.done(node) for node in (1, 2, 3)] == [[], [], []]
    assert not waiting.tiers.loads and not waiting.tiers.awaited


# --- what is served ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def working_set(cases: list[Case]) -> list[Case]:
    """Prompts that take four times what the device holds."""
    chosen: list[Case] = []
    for case in cases:
        if len(case.prompt) >= 300 and sum(len(each.prompt) for each in chosen) < 4 * POOL:
            chosen.append(case)
    return chosen


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags of servers that keep KV in the same files."""
    return [*FILES, "--file-storage-path", str(tmp_path_factory.mktemp("kv"))]


# Flags and environment of the server.
WAYS: dict[str, tuple[list[str], dict[str, str]]] = {
    "write-through": ([], {}),
    "write-back": (["--hicache-write-policy", "write_back"], {}),
    "two ranks": (["--tp-size", "2"], {"SGLANG_CPU_OMP_THREADS_BIND": "0|1", "TORCHDYNAMO_DISABLE": "1"}),
    "launched ahead": ([], {REPLAY_VARIABLE: "1"}),
}


USUAL, OTHER = list(WAYS)[:2], list(WAYS)[2:]


@pytest.fixture(scope="module", params=[*USUAL, *(pytest.param(way, marks=pytest.mark.long) for way in OTHER)])
def late(
    request: pytest.FixtureRequest, files: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A server whose copies take turns; all but the one that writes back keep files."""
    more, env = WAYS[request.param]
    flags = [*FLAGS, *TIERS, *more, *([] if "write_back" in more else files)]
    log = tmp_path_factory.mktemp("late") / "log"
    with serving(TINY, log, *flags, module=LATE, env=env) as server:
        yield server


def ask_all(server: Server, cases: list[Case], how: str, at_once: int = 4) -> list[dict[str, int]]:
    """Every answer must be the reference's; where what was cached of each prompt came from."""
    answers = server.generate_all([case.prompt for case in cases], 40, at_once=at_once)
    compare(cases, answers, how, most_close=0.3)
    return [answer["meta_info"].get("cached_tokens_details") or {} for answer in answers]


def whole_blocks(cases: list[Case]) -> int:
    return sum(len(case.prompt) // T * T for case in cases)


def test_a_working_set_of_four_times_the_device_comes_back_from_host_memory(
    late: Server, working_set: list[Case]
) -> None:
    ask_all(late, working_set, "first time")
    found = ask_all(late, working_set, "second time")
    by_tier = {tier: sum(each.get(tier, 0) for each in found) for tier in ("device", "host")}
    print(by_tier, "of", whole_blocks(working_set))
    assert sum(by_tier.values()) == whole_blocks(working_set)
    assert by_tier["host"] > 0.7 * whole_blocks(working_set)


def test_nothing_leaks_of_requests_that_end_while_they_load(late: Server, working_set: list[Case]) -> None:
    """The server empties both tiers when it is flushed, and ends if something is left."""
    rng = random.Random(3)
    ask_all(late, working_set, "before")
    asked = [(rng.choice(working_set), rng.random() < 0.5, rng.uniform(0.01, 0.2)) for _ in range(size(20, 60))]

    def ask(case: Case, leaves: bool, patience: float) -> dict[str, Any] | None:
        if not leaves:
            return late.generate(case.prompt, 40)
        sampling = {"temperature": 0, "max_new_tokens": 400, "ignore_eos": True}
        body = {"input_ids": case.prompt, "sampling_params": sampling}
        with contextlib.suppress(requests.Timeout):
            requests.post(late.url + "/generate", json=body, timeout=patience)
        return None

    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(ask, *zip(*asked, strict=True)))
    stayed = [(case, answer) for (case, *_), answer in zip(asked, answers, strict=True) if answer is not None]
    compare([case for case, _ in stayed], [answer for _, answer in stayed], "beside those that left", most_close=0.3)
    late.flush()
    (found,) = ask_all(late, working_set[:1], "after a flush")
    assert found.get("device", 0) == found.get("host", 0) == 0, "files are another matter"


def test_a_prompt_may_be_computed_while_it_is_loaded(late: Server, working_set: list[Case]) -> None:
    """Whoever wants log-probabilities of its prompt computes it, and then has pages of its own for what comes too."""
    cases = [case for case in working_set if not case.close_call][:3]

    def read(case: Case) -> dict[str, Any]:
        sampling = {"temperature": 0, "max_new_tokens": 40}
        body = {"input_ids": case.prompt, "sampling_params": sampling, "return_logprob": True, "logprob_start_len": 0}
        return late.post("/generate", body).json()

    with ThreadPoolExecutor(2) as pool:
        for case in cases:
            ask_all(late, [each for each in working_set if each is not case][:3], "others", at_once=2)
            loads, reads = pool.submit(late.generate, case.prompt, 40), pool.submit(read, case)
            compare([case, case], [loads.result(), reads.result()], "both")


@pytest.mark.parametrize("late", ["write-through"], indirect=True)
def test_kv_in_files_outlives_the_server(
    late: Server, files: list[str], working_set: list[Case], tmp_path: Path
) -> None:
    ask_all(late, working_set, "to be kept")
    late.flush()
    with serving(TINY, tmp_path / "log", *FLAGS, *TIERS, *files, module=LATE) as server:
        found = ask_all(server, working_set, "from files")
        from_files = sum(each.get("storage", 0) for each in found)
        print(from_files, "of", whole_blocks(working_set))
        assert from_files > 0.9 * whole_blocks(working_set)
        server.flush()


@pytest.mark.parametrize("late", ["write-through"], indirect=True)
def test_kv_in_files_is_that_of_the_weights_it_was_computed_with(late: Server, working_set: list[Case]) -> None:
    """Other weights find none of it, nor what was computed while KV was kept over an update; the same ones find it."""

    def update(folder: Path) -> None:
        late.flush()  # waits for copies on their way, which hold the cache
        change(folder, flush=True)

    def change(folder: Path, *, flush: bool) -> None:
        reply = late.post("/update_weights_from_disk", {"model_path": str(folder), "flush_cache": flush})
        assert reply.json()["success"], reply.text

    def from_files(cases: list[Case], how: str) -> int:
        return sum(each.get("storage", 0) for each in ask_all(late, cases, how))

    mine = sorted(working_set, key=lambda case: len(case.prompt))[:2]
    new = mine[0].prompt[1:]  # no block of which was ever computed
    others, [later] = decoded([case.prompt for case in mine], folder=FURTHER), decoded([new])
    ask_all(late, mine, "to be kept")
    late.flush()
    assert from_files(mine, "from files") > 0.9 * whole_blocks(mine)
    update(FURTHER)
    assert from_files(others, "other weights") == 0
    late.flush()
    assert from_files(others, "other weights, from files") > 0.9 * whole_blocks(mine)
    update(TINY)
    late.generate(new[: len(new) // 2], 1)
    change(FURTHER, flush=False)
    late.generate(new, 1)  # its second half with other weights than its first
    update(TINY)
    assert from_files([later], "the first weights again") < 0.6 * len(new)


def test_running_requests_go_on_while_another_one_loads(late: Server, working_set: list[Case]) -> None:
    """One of a token a turn has gone on by most of the turns of a long load when that is done."""
    case = max(working_set, key=lambda case: len(case.prompt))
    late.generate(case.prompt, 1)
    ask_all(late, [each for each in working_set if each is not case][:4], "others")
    sampling = {
        "temperature": 0,
        "max_new_tokens": 2 * LONG_TURNS,
        "ignore_eos": True,
        "custom_params": {"threshold": 1.0},
    }
    body = {"input_ids": case.prompt[-40:], "stream": True, "sampling_params": sampling}
    loads, counts = None, []
    with ThreadPoolExecutor(1) as pool, late.post("/generate", body, stream=True) as running:
        for event in each_event(running):
            counts.append(event["meta_info"]["completion_tokens"])
            loads = loads or pool.submit(late.generate, case.prompt, 1)
            if loads.done():
                break
        assert loads is not None
        assert loads.result()["meta_info"]["cached_tokens_details"]["host"] > MANY
    print("from", counts[0], "to", counts[-1], "tokens")
    assert counts[-1] - counts[0] > 0.8 * LONG_TURNS
