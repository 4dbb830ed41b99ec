"""CUDA graphs without CUDA: a graph backend for the CPU that captures nothing, replays by running again, and is strict.

Each replay runs the same Python again and must do, operation for operation, what the capture did (recording.py): a
device would repeat the capture, on its memory and with its scalars, whatever the Python now says. Padded rows must not
matter: their hidden states are NaN, their tokens and records arbitrary, in every replay. What fails is an
IntegrityError.

Off unless SGLANG_LLADA_REPLAY=1; for tests, since it is slower than running eagerly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sglang.srt.model_executor.model_runner_components.cuda_graph_setup import GraphCapture
from sglang.srt.model_executor.runner_backend.base_cuda_graph_backend import BaseCudaGraphBackend
from torch import Tensor

from sglang_llada.errors import IntegrityError
from sglang_llada.host.engine.graphs import RowGraphRunner
from sglang_llada.host.facts import is_ours
from sglang_llada.host.operations import kernel
from sglang_llada.host.replay.recording import Recording, recording, tensors

POISON_TOKEN, POISON_FIELD = 1, 7  # for what padded rows are given


def capture_on_cpu(original: Callable[..., Any], *, model_runner: Any) -> Any:
    """The host captures on the CPU only for torch.compile; for our models, capture with this backend instead."""
    if not is_ours(model_runner.server_args):
        return original(model_runner=model_runner)
    return GraphCapture(runner=ReplayRunner(model_runner), memory_phase="decode", memory_usage_gb=0, capture_time=0)


class ReplayRunner(RowGraphRunner):
    """The runner that a GPU would have, without the events that a CPU has no use for."""

    def _record_in_graph_metadata_prep_done(self) -> None:
        pass

    def _publish_read_done(self, in_graph: bool) -> None:
        pass


@dataclass(frozen=True, slots=True)
class Captured:
    """What stands for a graph: what to run, what it did when captured, and where its results lie."""

    run: Callable[[], Any]
    recording: Recording
    output: Any


class ReplayBackend(BaseCudaGraphBackend):
    """See the module."""

    def __init__(self, runner: RowGraphRunner, enable_memory_saver: bool = False) -> None:
        self.runner = runner
        self.graphs: dict[Any, Captured] = {}
        self.padding = slice(0, 0)  # tokens of the running step that are padding
        runner.model_runner.model.model.word_embeddings.register_forward_hook(self._poison_hidden)

    @contextmanager
    def capture_session(self, stream: Any) -> Iterator[None]:
        """There is no stream and no pool."""
        yield

    def capture_one(
        self,
        shape_key: Any,
        forward_fn: Callable[[], Any],
        capture_inputs: Any = None,
        post_warmup_hook: Callable[[], None] | None = None,
    ) -> None:
        """Run once for whatever is made on first use, then write down what a run does."""
        forward_fn()
        if post_warmup_hook is not None:
            post_warmup_hook()
        with recording() as recorded:
            output = forward_fn()
        self.graphs[shape_key] = Captured(forward_fn, recorded, output)

    def can_run(self, forward_batch: Any, shape_key: Any) -> bool:
        """Whether the size was captured."""
        return shape_key in self.graphs

    @contextmanager
    def replay_session(self) -> Iterator[None]:
        """Nothing to enter."""
        yield

    def replay(self, shape_key: Any, static_forward_batch: Any, **_: Any) -> Any:
        """Run again, compare, and put the results where the captured ones are."""
        graph = self.graphs[shape_key]
        self._poison(static_forward_batch.batch_size)
        with recording() as recorded:
            output = graph.run()
        recorded.must_equal(graph.recording)
        if not output.hidden_states[: self.padding.start].isfinite().all():
            raise IntegrityError("hidden states are not finite, as only those of padded rows are made to be")
        self.padding = slice(0, 0)
        overwrite(graph.output, output)
        return graph.output

    def cleanup(self) -> None:
        """Forget what was captured."""
        self.graphs.clear()

    def _poison(self, rows: int) -> None:
        runner = self.runner
        size, layout = runner.bs, runner.decider.layout
        self.padding = slice(rows * layout.block_size, size * layout.block_size)
        runner.packed[rows:size, layout.tokens] = POISON_TOKEN
        runner.packed[rows:size, layout.record] = POISON_FIELD

    def _poison_hidden(self, module: Any, args: Any, hidden: Tensor) -> None:
        poison(hidden, self.padding)


@kernel
def poison(hidden: Tensor, where: slice) -> None:
    """Make rows of hidden states NaN."""
    hidden[where] = float("nan")


def overwrite(kept: Any, new: Any) -> None:
    """Copy the tensors of one result over those of another of the same form."""
    for old, value in zip(tensors(kept), tensors(new), strict=True):
        old.copy_(value)
