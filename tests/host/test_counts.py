"""What a step costs, in counts, without a GPU: launches, copies, waits and bytes, of the model runner that serves.

LLaDA2.0-mini's shape with three layers, one of them dense, on a device of which only shapes exist (shapes.py). A count
here is the sum of what the device would be given; the first GPU that ran these steps had the same ones
(bench/results/gpu-h200.txt), but for what cuBLAS and the driver add: sums of split products, a memset.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_llada.blocks import Request, next_step
from sglang_llada.card import card_of
from sglang_llada.config import COMPILE_VARIABLE, DecodeConfig, Report, Sampling
from sglang_llada.decode.contract import Tokens
from sglang_llada.decode.layout import fresh, numbers
from tests.host.conftest import TINY
from tests.host.pretend import HOPPER, Task, in_a_process
from tests.host.shapes import COPY, KERNEL, WAIT, Device, Event, runner_on

pytestmark = [pytest.mark.host, pytest.mark.slow, pytest.mark.timeout(300)]

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
PUBLISHED = Path(__file__).parents[1] / "published"
PROMPT_ROWS = 39  # more than the largest graph of these tests holds
LAYERS, VOCABULARY, T, MASK = 3, 157_184, 32, 156_895
LONG = [5] * (PROMPT_ROWS * T + 3)
PLAIN, INSERTING = Tokens(MASK), Tokens(MASK, 156_930, 156_931)

GREEDY, EDITING = DecodeConfig.defaults(T), DecodeConfig.defaults(T, "levenshtein", indel=True)
SAMPLING = Sampling(temperature=1.0, top_k=1 << 30, top_p=0.9, min_p=0.0, seed=7)
CASES: dict[str, tuple[int, dict[str, Any]]] = {  # rows, and what the request of each asks for
    "1": (1, {}),
    "32": (32, {}),
    "log-probabilities": (8, {"report": Report(top=5, ids=(3, 4))}),
    "sampled": (8, {"sampling": SAMPLING}),
    "sampled, log-probabilities": (8, {"sampling": SAMPLING, "report": Report(top=5)}),
}
BIASED = "one of 8 sampled with a bias"


# --- in the process that has the device -----------------------------------------------------------------------------


def counted(folder: Path) -> dict[str, dict[Any, list[Event]]]:
    """What happens in a step of each case, from its launch until it is read, and in the graph of each size."""
    from sglang_llada.host.engine.executor import Executor

    device, compiling = Device(VOCABULARY), begun()
    sizes = sorted({str(rows) for rows, _ in CASES.values()} | {"2", "4"})  # selection has a form for each
    runner = runner_on(device, folder, 1, "--cuda-graph-bs-decode", *sizes)
    graphs = runner.decode_cuda_graph_runner
    steps = {}
    with device.on(), torch.inference_mode():
        executor = Executor(runner, graphs.decider)
        for case, (rows, asked) in CASES.items():
            for _ in range(2):  # the first makes what all steps of a size share
                requests = [a_request(slot, [5, 6, 7], **asked) for slot in range(rows)]
                steps[case] = step(executor, device, requests, rows, replayed=True)
        requests = [a_request(slot, [5, 6, 7], sampling=SAMPLING) for slot in range(8)]
        requests[3].shaping, requests[3].plain, requests[3].needs_host = Bias(), False, True
        steps[BIASED] = step(executor, device, requests, 8, replayed=True)
        for _ in range(2):
            requests = [a_request(0, LONG)]
            steps["prompt"] = step(executor, device, requests, PROMPT_ROWS + 1, replayed=False)
        steps["planted"] = planted(device)
    captured = {(key.size, key.variant_label): graph.events for key, graph in graphs.backend.graphs.items()}
    return {"steps": steps, "graphs": captured, "kernels": kernels(device, compiling)}


def begun() -> list[dict[str, Any]]:
    """Where it will stand what this process has compiled beside its loading of weights."""
    from sglang_llada.host.engine import compiling

    os.environ[COMPILE_VARIABLE] = "1"
    requests: list[dict[str, Any]] = []
    compiling.begin = requests.append
    return requests


def kernels(device: Device, requests: list[dict[str, Any]]) -> tuple[set[str], set[str]]:
    """Ours that were launched, and those that the one request is for."""
    from sglang_llada.kernels import kernels_of

    (request,) = requests
    assert request["card"] == card_of(torch.device("cuda", 0))
    launched, compiled = (
        {f"{name} {json.loads(data)['key']}" for name, data in some}
        for some in (device.kernels, kernels_of(request["launches"]))
    )
    return launched, compiled


def elsewhere(folder: Path) -> tuple[list[Event], tuple[set[str], set[str]]]:
    """Of a checkpoint that inserts, with attention of the host's that plans, on the first of two ranks, of which the
    second has nothing compiled: what happens in a step, and kernels()."""
    from sglang_llada.host.engine import compiling
    from sglang_llada.host.engine.executor import Executor

    device, requests = Device(VOCABULARY), begun()
    flags = ("--attention-backend", "triton", "--cuda-graph-bs-decode", "1", "2", "4", "8")
    runner = runner_on(device, folder, 2, *flags, "--disable-custom-all-reduce")
    with device.on(), torch.inference_mode():
        executor = Executor(runner, runner.decode_cuda_graph_runner.decider)
        for _ in range(2):
            few = [a_request(slot, [5, 6, 7], EDITING, INSERTING) for slot in range(7)]
            events = step(executor, device, few, 7, replayed=True)
        many = a_request(0, LONG, EDITING, INSERTING, sampling=SAMPLING)
        step(executor, device, [many], PROMPT_ROWS + 1, replayed=False)
    os.environ[COMPILE_VARIABLE] = "0"
    assert not compiling.is_wanted()
    os.environ[COMPILE_VARIABLE] = "1"
    assert compiling.is_wanted()
    vars(compiling)["get_parallel"] = lambda: SimpleNamespace(tp_rank=1)
    assert not compiling.is_wanted()
    return events, kernels(device, requests)


class Bias:
    """What stands for Shaping."""

    matcher = None

    def of(self, request: Any, positions: list[int]) -> Any:
        return lambda logits: logits + 1.0


def step(
    executor: Any, device: Device, requests: list[Request[DecodeConfig]], rows: int, *, replayed: bool
) -> list[Event]:
    """What happens in the next step of requests."""
    plan = next_step(requests, 1000)
    assert len(plan.rows) == rows
    device.events.clear()
    launched = executor.launch(plan)
    assert launched.replayed == replayed
    assert executor.read(launched) is not None
    return list(device.events)


def a_request(
    slot: int, prompt: list[int], how: DecodeConfig = GREEDY, tokens: Tokens = PLAIN, **asked: Any
) -> Request[DecodeConfig]:
    """One whose next step fills its prompt and decides the block behind it."""
    params = replace(how, **asked)
    made = Request(
        f"r{slot}",
        prompt,
        64,
        frozenset(),
        params,
        block_size=T,
        mask_id=MASK,
        fresh=fresh(T, tokens),
        numbers=numbers(params),
        plain=params.plain,
        needs_host=params.report is not None,
        noted=params.report is not None,
    )
    made.slot = slot
    made.admit(0)
    return made


def planted(device: Device) -> list[Event]:
    """Of each thing that is counted one."""
    device.events.clear()
    x = torch.zeros(2, 3).to("cuda")
    x.view(3, 2)
    (x + 1).cpu()
    torch.zeros(3).pin_memory().to("cuda", non_blocking=True)
    x.sum().item()
    torch.empty(4, VOCABULARY, device="cuda").exp()
    torch.cuda.synchronize()
    return list(device.events)


# --- in the test's process ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[Any, list[Event]]]:
    """What counted() saw."""
    return with_a_device(counted, "LLaDA2.0-mini", tmp_path_factory.mktemp("mini"))


def with_a_device(task: Task, name: str, folder: Path) -> Any:
    """What a task makes of a published checkpoint's shape with few layers, where torch has a device."""
    for each in TOKENIZER:
        shutil.copy(TINY / each, folder)
    config = json.loads((PUBLISHED / f"{name}.config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": LAYERS}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SGLANG_ENABLE_JIT_DEEPGEMM", "0")  # which looks for a driver when it is imported
        (found,) = in_a_process(task, [folder], HOPPER)
    return found


@pytest.fixture(scope="module")
def seen_elsewhere(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Event], tuple[set[str], set[str]]]:
    """What elsewhere() saw."""
    found: tuple[Any, Any] = with_a_device(elsewhere, "LLaDA2.2-mini", tmp_path_factory.mktemp("mini2.2"))
    return found


def test_what_is_compiled_while_weights_are_loaded_is_what_is_launched(seen: Any, seen_elsewhere: Any) -> None:
    """No request waits for a compiler, whatever the number of its positions, and nothing is compiled in vain."""
    for launched, compiled in (seen["kernels"], seen_elsewhere[1]):
        assert launched == compiled


def test_a_step_with_attention_that_plans_copies_and_waits_no_more(seen_elsewhere: Any) -> None:
    """The plan, which is on the device, is made of rows that are unfolded there before the graph unfolds them again."""
    events = seen_elsewhere[0]
    assert [event.name for event in events if event.kind == COPY and event.name != "within"] == ["in", "out"]
    assert not any(event.waits for event in events)
    assert [event.name for event in events if event.kind == WAIT] == ["event"]


def names(events: list[Event]) -> list[str]:
    """Of kernels, in order."""
    return [event.name for event in events if event.kind == KERNEL]


def test_what_is_counted(seen: dict[str, dict[Any, list[Event]]]) -> None:
    assert seen["steps"]["planted"] == [
        Event(COPY, "in", 24, waits=True),  # from memory that is not pinned
        Event(KERNEL, "aten::add.Tensor"),
        Event(COPY, "out", 24, waits=True),
        Event(COPY, "in", 12),
        Event(KERNEL, "aten::sum"),
        Event(WAIT, "read"),
        Event(KERNEL, "aten::exp", 4 * 4 * VOCABULARY),
        Event(WAIT, "event"),
    ]


@pytest.mark.parametrize("rows", [1, 32])
def test_a_greedy_step_is_a_copy_a_graph_a_copy_and_a_wait(rows: int, seen: dict[str, dict[Any, list[Event]]]) -> None:
    """All that the host asks of the device: one table of numbers in, 51 a row; one out, 36 a row; both from and to
    pinned memory and not waited for, but by one event when the step is read."""
    assert seen["steps"][str(rows)] == a_graph(rows)


def test_so_is_a_step_of_rows_that_draw(seen: dict[str, dict[Any, list[Event]]]) -> None:
    assert seen["steps"]["sampled"] == a_graph(8)


def a_graph(rows: int) -> list[Event]:
    """A step that is nothing but one."""
    return [
        Event(COPY, "in", rows * 51 * 8),
        Event(KERNEL, "graph"),
        Event(COPY, "out", rows * 36 * 8),
        Event(WAIT, "event"),
    ]


@pytest.mark.parametrize(("rows", "most"), [(1, 15), (32, 14)])
def test_kernels_of_a_layer(rows: int, most: int, seen: dict[str, dict[Any, list[Event]]]) -> None:
    """Two norms, four products (heads, output, router; with one row their attention's merge), norms with rotation and
    KV, attention, routing, two that sort tokens by expert, two of experts, their activation, their sum."""
    found = names(seen["graphs"][rows, None])
    _, first, second = (at for at, name in enumerate(found) if name == "attention_triton.attend_kernel")
    print(Counter(found[first:second]))
    assert second - first == most


@pytest.mark.parametrize("rows", [1, 32])
def test_kernels_of_selection_and_decision(rows: int, seen: dict[str, dict[Any, list[Event]]]) -> None:
    """Selection is two, of which the first reads the head once; around it hidden states are gathered and rows decided.
    Nothing comes between them."""
    found = names(seen["graphs"][rows, None])
    assert found[-4:] == [*SELECTION, "decide_triton.rows_kernel"]
    assert not {name for name in found[:-4] if name.startswith(OURS)}


def test_kernels_of_draws(seen: dict[str, dict[Any, list[Event]]]) -> None:
    """Of a graph for steps in which rows draw, between selection and decision: a pass that draws, four that look for
    the cut and one that draws again, each of which is two."""
    found, plain = names(seen["graphs"][8, "drawn"]), names(seen["graphs"][8, None])
    draws, bounds = (["sampling_triton.slice_kernel", f"sampling_triton.{fold}"] for fold in FOLDS)
    passes = [*draws, *4 * bounds, *draws]
    assert found == [*plain[:-1], *passes, plain[-1]]


FOLDS = ("draws_kernel", "bounds_kernel")
SELECTION = ["decide_triton.gather_kernel", "select_triton.kernel", "select_triton.fold_kernel"]
OURS = ("select_triton", "decide_triton", "sampling_triton")


def test_kernels_beside_the_layers(seen: dict[str, dict[Any, list[Event]]]) -> None:
    """Rows are unfolded from their table in 15, then there are the embedding and the first norm; the last norm is the
    one that every layer ends with. Five copies fill the graph's buffers, one keeps the decisions for the next step."""
    events = seen["graphs"][32, None]
    assert names(events).index("rmsnorm") == 15
    assert sum(event.kind == COPY for event in events) == 6
    assert {event.name for event in events if event.kind == COPY} == {"within"}


def test_a_step_of_a_long_prompt_waits_once(seen: dict[str, dict[Any, list[Event]]]) -> None:
    """It runs eagerly, which the host must not be held up by: one copy in, one out, one event; no logits."""
    events = seen["steps"]["prompt"]
    assert Counter(event.name for event in events if event.kind == COPY and event.name != "within") == {
        "in": 1,
        "out": 1,
    }
    assert not any(event.waits for event in events)
    assert [event.name for event in events if event.kind == WAIT] == ["event"]
    assert sum(event.size for event in events if event.kind == KERNEL) == 0


def test_a_graph_waits_for_nothing(seen: dict[str, dict[Any, list[Event]]]) -> None:
    assert not [event for events in seen["graphs"].values() for event in events if event.kind == WAIT or event.waits]


@pytest.mark.parametrize("case", CASES)
def test_no_bytes_of_whole_logits(case: str, seen: dict[str, dict[Any, list[Event]]]) -> None:
    rows, asked = CASES[case]
    events = [*seen["steps"][case], *seen["graphs"][rows, "drawn" if "sampling" in asked else None]]
    assert sum(event.size for event in events if event.kind == KERNEL) == 0


def test_a_bias_costs_logits_of_its_own_positions_and_selects_nobody_again(
    seen: dict[str, dict[Any, list[Event]]],
) -> None:
    """29 open positions of one row, and once more where their logits are copied: the product, a penalty that is zero
    here, the bias, its place, and what the best token is found with."""
    events = seen["steps"][BIASED]
    made = [event.size for event in events if event.kind == KERNEL and event.size]
    print(made)
    assert set(made) == {29 * 4 * VOCABULARY}
    assert not {name for name in names(events) if name.startswith("select_triton")}
    assert names(events).count("decide_triton.gather_kernel") == 0
    assert not any(event.waits for event in events)
    assert Counter(event.name for event in events if event.kind == COPY and event.name == "out") == {"out": 1}


@pytest.mark.parametrize(("case", "into", "out"), [("log-probabilities", 2, 1), ("sampled, log-probabilities", 2, 1)])
def test_copies_of_steps_that_want_more(
    case: str, into: int, out: int, seen: dict[str, dict[Any, list[Event]]]
) -> None:
    """However many requests want it: one with their positions and what to report. Reports come out with the outcome,
    and nothing is waited for but the one event when the step is read."""
    events = seen["steps"][case]
    copies = Counter(event.name for event in events if event.kind == COPY)
    assert copies["in"] == into and copies["out"] == out
    assert not any(event.waits for event in events)
    assert [event.name for event in events if event.kind == WAIT] == ["event"] * out
