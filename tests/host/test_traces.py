"""Spans of a request's stages, as a collector gets them from a server with `--enable-trace`."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.host.conftest import TINY
from tests.host.serving import Server, free_port, serving

collector = pytest.importorskip(
    "opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc",
    reason="opentelemetry-exporter-otlp is not installed; `pip install '.[test]'` brings it",
)
messages = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
grpc = pytest.importorskip("grpc", reason="grpcio is not installed; the host brings it")

pytestmark = [pytest.mark.host, pytest.mark.slow, pytest.mark.timeout(600)]

STAGES = ["request_process", "prefill_waiting", "prefill_forward", "decode_forward"]


@dataclass(frozen=True, slots=True)
class Span:
    """A span, with what it hangs on; times in seconds."""

    name: str
    id: bytes
    parent: bytes
    trace: bytes
    start: float
    end: float
    attributes: dict[str, Any]
    events: list[str]

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass
class Collector(collector.TraceServiceServicer):
    """Keeps every span that is sent to it."""

    spans: list[Span] = field(default_factory=list)

    def Export(self, request: Any, context: Any) -> Any:
        for resource in request.resource_spans:
            self.spans += [span_of(each) for scope in resource.scope_spans for each in scope.spans]
        return messages.ExportTraceServiceResponse()

    def of(self, rid: str) -> list[Span]:
        """The spans of a request in the order in which they began, once its own has come."""
        deadline = time.monotonic() + 20
        while True:
            roots = [span for span in self.spans if span.attributes.get("rid") == rid]
            if roots:
                time.sleep(1.5)  # two turns of the exporters, which are processes of their own
                found = [span for span in list(self.spans) if span.trace == roots[0].trace]
                return sorted(found, key=lambda span: (span.start, span.end))
            assert time.monotonic() < deadline, f"no span of {rid}; there are {[span.name for span in self.spans]}"
            time.sleep(0.1)


def span_of(sent: Any) -> Span:
    """A span as it was sent."""
    attributes = {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in sent.attributes}
    times = (sent.start_time_unix_nano / 1e9, sent.end_time_unix_nano / 1e9)
    ids = (sent.span_id, sent.parent_span_id, sent.trace_id)
    return Span(sent.name, *ids, *times, attributes, [event.name for event in sent.events])


@contextmanager
def traced(log: Path, *flags: str) -> Iterator[tuple[Server, Collector]]:
    """A server, and the collector of its spans."""
    keeps, port = Collector(), free_port()
    listening = grpc.server(ThreadPoolExecutor(2))
    collector.add_TraceServiceServicer_to_server(keeps, listening)
    listening.add_insecure_port(f"127.0.0.1:{port}")
    listening.start()
    try:
        with serving(TINY, log, "--enable-trace", "--otlp-traces-endpoint", f"127.0.0.1:{port}", *flags) as server:
            yield server, keeps
    finally:
        listening.stop(None)


def ask(server: Server, rid: str, new_tokens: int, **params: Any) -> dict[str, Any]:
    """An answer of so many tokens, under a name."""
    sampling = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True, "custom_params": params}
    reply = server.post("/generate", {"rid": rid, "text": "abc " * 30, "sampling_params": sampling})
    answer: dict[str, Any] = reply.json()
    return answer


def scheduler_spans(spans: list[Span], rank: int = 0) -> list[Span]:
    """Those of a rank's scheduler: its own, and the stages in it; every parent is there."""
    ids = {span.id for span in spans}
    assert len(ids) == len(spans) and [span.parent for span in spans if span.parent not in ids] == [b""]
    (own,) = [span for span in spans if span.attributes.get("thread_label") == "Scheduler" and of_rank(span, rank)]
    stages = [span for span in spans if span.parent == own.id]
    return [own, *stages, *(span for span in spans if span.parent in {stage.id for stage in stages})]


def of_rank(span: Span, rank: int) -> bool:
    return bool(span.attributes["tp_rank"] == rank)


def check_stages(spans: list[Span], answer: dict[str, Any]) -> None:
    """Of a request that was never retracted: one stage after the other, and what it took."""
    meta, (own, *stages) = answer["meta_info"], spans
    loops = [span for span in stages if span.name == "decode_loop"]
    stages = [span for span in stages if span.name != "decode_loop"]
    assert [span.name for span in stages] == STAGES
    for before, after in zip(stages[1:], stages[2:], strict=False):
        assert after.start == pytest.approx(before.end, abs=2e-6), "no time is in none of them, or in two"
    decode = stages[-1]
    assert own.start <= stages[0].start + 1e-3 and decode.end <= own.end + 1e-6
    assert {span.parent for span in loops} == {decode.id}
    assert sum(span.seconds for span in loops) == pytest.approx(decode.seconds, abs=1e-5)
    assert [span.attributes["steps"] for span in loops] == meta["dllm_forward_counts"]
    assert [span.attributes["block"] for span in loops] == list(range(len(loops)))
    assert decode.attributes == {
        "tokens": meta["completion_tokens"],
        "forwards": meta["dllm_nfe"],
        "steps": meta["dllm_steps"],
        "blocks": len(meta["dllm_forward_counts"]),
        "tokens_per_forward": pytest.approx(meta["completion_tokens"] / meta["dllm_nfe"]),
    }


def test_a_trace_tells_every_stage_of_a_request(tmp_path: Path) -> None:
    with traced(tmp_path / "log", "--max-running-requests", "4") as (server, spans):
        answered = ask(server, "answered", 100)
        check_stages(scheduler_spans(spans.of("answered")), answered)

        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(ask, server, "retracted", 220, threshold=1)
            for _ in range(2):
                time.sleep(0.3)
                server.post("/pause_generation", {"mode": "retract"})
                server.post("/continue_generation")
        check_retracted(scheduler_spans(spans.of("retracted")), answer.result())
        check_aborted(server, spans)
        refused = ask(server, "refused", 5, threshold=7)
        assert "threshold is 7" in str(refused) and scheduler_spans(spans.of("refused"))


def check_retracted(spans: list[Span], answer: dict[str, Any]) -> None:
    """It waited, was filled and decoded once more for each time; blocks are told once."""
    times = answer["meta_info"]["num_retractions"] + 1
    assert times > 1
    own, *stages = spans
    names = [span.name for span in stages if span.name != "decode_loop"]
    assert names == [STAGES[0], *STAGES[1:] * times]
    assert sum("retract" in span.events for span in stages) == times - 1
    loops = [span for span in stages if span.name == "decode_loop"]
    assert [span.attributes["steps"] for span in loops] == answer["meta_info"]["dllm_forward_counts"]
    last = [span for span in stages if span.name == "decode_forward"][-1]
    assert last.attributes["tokens"] == answer["meta_info"]["completion_tokens"] and last.end <= own.end + 1e-6


def check_aborted(server: Server, spans: Collector) -> None:
    """One whose client leaves, and one that is given up in the queue, behind four that fill the server."""
    leaving = {"rid": "left", "stream": True, "text": "abc", "sampling_params": {"max_new_tokens": 400}}
    leaving["sampling_params"] |= {"ignore_eos": True, "custom_params": {"threshold": 1}}
    with server.post("/generate", leaving, stream=True) as reply:
        next(reply.iter_lines())
    own, *stages = scheduler_spans(spans.of("left"))
    decode = next(span for span in stages if span.name == "decode_forward")
    assert decode.attributes["tokens"] < 400 and decode.end <= own.end + 1e-6

    running = [threading.Thread(target=ask, args=(server, f"long{i}", 60), kwargs={"threshold": 1}) for i in range(4)]
    for thread in running:
        thread.start()
    while server.load()["num_running_reqs"] < 4:
        time.sleep(0.02)
    waiting = threading.Thread(target=ask, args=(server, "waiting", 60))
    waiting.start()
    while not server.load()["num_waiting_reqs"]:
        time.sleep(0.02)
    requests.post(server.url + "/abort_request", json={"rid": "waiting"}, timeout=20)
    for thread in (*running, waiting):
        thread.join()
    assert [span.name for span in scheduler_spans(spans.of("waiting"))[1:]] == ["request_process"]


@pytest.mark.long
def test_each_of_two_ranks_tells_its_stages(tmp_path: Path, few_threads: None) -> None:
    with traced(tmp_path / "log", "--tp-size", "2") as (server, spans):
        answer = ask(server, "answered", 100)
        found = spans.of("answered")
        for rank in (0, 1):
            check_stages(scheduler_spans(found, rank), answer)
