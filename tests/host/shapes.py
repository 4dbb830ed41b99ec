"""A GPU of which nothing but shapes exists: what a step launches, copies and waits for, on a machine that has none.

In a process whose torch pretends to have a card (pretend.py) tensors of the device are fake, tensors of the host are
real, and everything that passes between the two or runs on the device is written down. The model runner, the graph
runner, the executor and the layers are those that serve; so are the bodies of all Triton wrappers, ours and the host's,
down to the launch. What is not there: streams (all is in order), the host's compiled kernels (they are told by name,
see COMPILED), and the ranks beside this one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sglang_llada.card import card_of
from sglang_llada.kernels import Kernels, Target, noting
from tests.host.ranks import Job, make_runner
from tests.host.serving import free_port

# The host's compiled kernels that a step of ours launches, by operator: into how many kernels each is compiled.
COMPILED = {
    "sgl_kernel::moe_align_block_size": 2,  # align, then count and sort
    "sgl_kernel::moe_sum_reduce": 1,
    "sglang::_run_activation_inplace": 1,
}
SCHEMAS = (
    "moe_align_block_size(Tensor ids, int experts, int block, Tensor sorted, Tensor expert_ids, Tensor count,"
    " Tensor sums, bool pad, bool ignore=False) -> ()",
    "moe_sum_reduce(Tensor parts, Tensor out, float factor) -> ()",
)
MEMORY_ONLY = {"aten::empty", "aten::empty_like", "aten::new_empty", "aten::empty_strided", "aten::detach"} | {
    "aten::_unsafe_view"
}

KERNEL, COPY, WAIT, COLLECTIVE = "kernel", "copy", "wait", "collective"


class Event(NamedTuple):
    """Something that the device does, or is waited for.

    Attributes:
        kind: one of the four above.
        name: of a kernel, a wait or a collective; of a copy "in", "out" or "within".
        size: of a copy and of a collective its bytes; of a kernel those of the fp32 logits that it writes, of positions
            times all tokens.
        waits: whether the host waits: of a copy from or to memory that is not pinned, or one that is not asynchronous.
    """

    kind: str
    name: str
    size: int = 0
    waits: bool = False


class Fakes(FakeTensorMode):
    """Fake tensors of a device that torch believes in and that must not be touched."""

    avoid_device_init = True


class Device(TorchDispatchMode):
    """See the module. `events` is what happened since it was last emptied; `kernels` are those of ours that were ever
    launched, and for what each would have been compiled."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.events: list[Event] = []
        self.kernels: Kernels = {}
        self.pinned: list[Tensor] = []
        self.fakes = Fakes(allow_non_fake_inputs=True)

    @contextmanager
    def on(self) -> Iterator[None]:
        """Tensors of the device are fake."""
        with self.fakes, self:
            yield

    def launched(self, name: str, out: Any = None) -> None:
        """A kernel of so many logits."""
        logits = [t for t in tree_leaves(out) if isinstance(t, FakeTensor) and t.shape[-1:] == (self.vocabulary,)]
        size = sum(t.numel() * t.element_size() for t in logits if t.dtype == torch.float32 and t.dim() > 1)
        self.events += [Event(KERNEL, name, size)] * COMPILED.get(name, 1)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, space = func.name(), func.namespace
        if space == "sgl_kernel":
            return self.launched(name)
        if space == "sglang_llada":  # the wrapper's own code, as far as the launch
            with self:
                return OPDEFS[name]._init_fn(*args, **kwargs)
        if space == "aten":
            with self:  # in inference mode composite operations come here whole
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        leaves = tree_leaves((args, kwargs))
        faked = [each for each in leaves if isinstance(each, FakeTensor)]
        device = next((each for each in leaves if isinstance(each, torch.device)), None)
        if name.startswith("aten::empty_like") and device is not None and device.type == "cpu":
            faked, args = [], (on_the_host(args[0]),)
        if not faked and (device is None or device.type == "cpu"):
            return self.on_host(func, args, kwargs)
        if name == "aten::_local_scalar_dense":
            self.events.append(Event(WAIT, "read"))
            return 1
        if space == "c10d":
            self.events.append(Event(COLLECTIVE, func.name(), sum(t.numel() * t.element_size() for t in faked)))
            return func(*args, **kwargs)
        copied = self.copied(name, args, kwargs, device)
        if copied is not None:
            return copied
        result = func(*args, **kwargs)
        if space != "prim" and not func.is_view and name.partition(".")[0] not in MEMORY_ONLY:
            self.launched(name, result)
        return result

    def on_host(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An operation on real tensors, of which those in pinned memory are remembered."""
        pins = kwargs.pop("pin_memory", False)
        with unset_fake_temporarily():
            if func.name() == "aten::_pin_memory":
                pins, result = True, args[0].clone()
            else:
                result = func(*args, **kwargs)
                if pins:
                    result.zero_()  # what comes from the device has no values
        if pins:
            self.pinned.append(result)
        return result

    def copied(self, name: str, args: Any, kwargs: Any, device: torch.device | None) -> Tensor | None:
        """The result of a copy, or None if the operation is none."""
        if name == "aten::copy_":
            to, source = args[0], args[1]
            asynchronous = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
        elif name == "aten::_to_copy" and device is not None and device.type != args[0].device.type:
            source, asynchronous = args[0], kwargs.get("non_blocking", False)
            kind = kwargs.get("dtype") or source.dtype
            to = (
                on_the_host(source, kind)
                if device.type == "cpu"
                else torch.empty(source.shape, dtype=kind, device=device)
            )
        else:
            return None
        places = {True: "device", False: "host"}
        ends = places[isinstance(source, FakeTensor)], places[isinstance(to, FakeTensor)]
        on_host = [t for t in (source, to) if not isinstance(t, FakeTensor)]
        waits = bool(on_host) and not (asynchronous and all(map(self.is_pinned, on_host)))
        way = {("host", "device"): "in", ("device", "host"): "out", ("device", "device"): "within"}[ends]
        self.events.append(Event(COPY, way, source.numel() * source.element_size(), waits))
        return to

    def is_pinned(self, tensor: Tensor) -> bool:
        """Whether a tensor of the host lies in pinned memory."""
        return any(tensor.untyped_storage().data_ptr() == p.untyped_storage().data_ptr() for p in self.pinned)


def on_the_host(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A real tensor of the shape of a fake one: zeros."""
    with unset_fake_temporarily():
        return torch.zeros(tensor.shape, dtype=dtype or tensor.dtype)


class Graph(NamedTuple):
    """A captured size: what its replay does, and its results."""

    events: list[Event]
    output: Any


def backend(device: Device) -> type:
    """The graph backend of a device: a replay is one launch, of what was seen in the capture."""
    from sglang.srt.model_executor.runner_backend.base_cuda_graph_backend import BaseCudaGraphBackend

    class Graphs(BaseCudaGraphBackend):
        def __init__(self, runner: Any) -> None:
            self.graphs: dict[Any, Graph] = {}

        @contextmanager
        def capture_session(self, stream: Any) -> Iterator[None]:
            yield

        def capture_one(self, shape_key: Any, forward_fn: Callable[[], Any], **_: Any) -> None:
            forward_fn()  # whatever is made on first use
            device.events.clear()
            output = forward_fn()
            self.graphs[shape_key] = Graph(list(device.events), output)

        def can_run(self, forward_batch: Any, shape_key: Any) -> bool:
            return shape_key in self.graphs

        @contextmanager
        def replay_session(self) -> Iterator[None]:
            yield

        def replay(self, shape_key: Any, static_forward_batch: Any, **_: Any) -> Any:
            device.launched("graph")
            return self.graphs[shape_key].output

        def cleanup(self) -> None:
            self.graphs.clear()

    return Graphs


class Mark:
    """An event or a stream of the device. Waiting for either is written down."""

    events: list[Event]
    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None:
        self.device = torch.device("cuda", 0)

    def synchronize(self) -> None:
        self.events.append(Event(WAIT, "event"))

    def record(self, *_: Any) -> None: ...

    wait = wait_stream = wait_event = record


def runner_on(device: Device, folder: Path, ranks: int, *flags: str) -> Any:
    """Rank 0's model runner on the device, of a checkpoint of which only the configuration counts."""
    stand_in(device)
    from sglang.srt.plugins import load_plugins

    load_plugins()
    job = Job(None, folder, free_port(), ("--load-format", "dummy", "--tp-size", str(ranks), *flags), None)  # type: ignore[arg-type]
    with device.on():
        return make_runner(0, job)


def stand_in(device: Device) -> None:
    """Put what a device would do in the place of what looks for its driver."""
    import sglang.srt.distributed.device_communicators.pynccl as pynccl
    import sglang.srt.distributed.device_communicators.shm_broadcast as queues
    import sglang.srt.layers.layernorm as layernorm
    import sglang.srt.model_executor.runner.decode_cuda_graph_runner as graphs
    import sglang.srt.model_loader.loader as loader
    from sglang.srt.model_executor.model_runner import ModelRunner
    from torch.testing._internal.distributed.fake_pg import FakeStore

    cuda: Any = torch.cuda
    properties = cuda.get_device_properties()
    properties.is_integrated = False
    Mark.events = device.events
    cuda.Event = cuda.Stream = Mark
    cuda.stream = lambda stream: nullcontext()
    cuda.synchronize = lambda device=None: Mark().synchronize()
    for name in ("current_stream", "default_stream"):
        setattr(cuda, name, lambda device=None: Mark())  # one for each: torch.compile tells its functions apart
    for name in ("set_device", "init", "empty_cache"):
        setattr(cuda, name, lambda *_: None)
    for name in ("memory_allocated", "memory_reserved"):
        setattr(cuda, name, lambda device=None: 0)
    cuda.is_current_stream_capturing = lambda: False

    # Groups of ranks whose others are not there.
    make, split = dist.init_process_group, dist.new_group
    distributed: Any = dist
    distributed.init_process_group = lambda *_, world_size, rank, **__: make(
        "fake", store=FakeStore(), rank=rank, world_size=world_size
    )
    distributed.new_group = lambda ranks=None, *_, **__: split(ranks, backend="fake")
    distributed.monitored_barrier = lambda *_, **__: None
    pynccl.PyNcclCommunicator = queues.MessageQueue.create_from_process_group = lambda *_, **__: None
    runner: Any = ModelRunner
    runner.maybe_init_expert_location_metadata = lambda self: None  # reads what it has put on the device
    loader.initialize_dummy_weights = lambda model: None

    # The host's compiled kernels. Those of norms are built for a device when they are first called.
    library = torch.library.Library("sgl_kernel", "FRAGMENT")
    for schema in SCHEMAS:
        library.define(schema)
    sys.modules["tests.host.shapes"].__dict__["LIBRARY"] = library  # which ends with its object

    def rmsnorm(x: Tensor, *_: Any, **__: Any) -> Tensor:
        device.launched("rmsnorm")
        return torch.empty_like(x)

    layernorm.rmsnorm = rmsnorm
    layernorm.fused_add_rmsnorm = lambda *_, **__: device.launched("fused_add_rmsnorm")
    show_inside()
    launch(device)
    graphs.resolve_decode_backend = backend(device)


def launch(device: Device) -> None:
    """Let Triton work out what it would compile of ours, and do neither that nor launch anything."""
    from triton.knobs import runtime
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    jit: Any = JITFunction
    launch = jit.run

    def run(self: Any, *args: Any, **kwargs: Any) -> None:
        device.launched(f"{self.fn.__module__.rpartition('.')[2]}.{self.fn.__name__}")
        if self.fn.__module__.startswith("sglang_llada."):
            launch(self, *args, **kwargs)

    jit.run = run
    driver.set_active(Target(card_of(torch.device("cuda", 0))))
    runtime.jit_cache_hook = noting(device.kernels)


def show_inside() -> None:
    """Let the host's operator for experts be what it does."""
    import inspect

    experts = sys.modules["sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe"]
    for name, inplace in (("inplace_fused_experts", True), ("outplace_fused_experts", False)):
        known = list(inspect.signature(getattr(experts, name)).parameters)

        def run(*args: Any, known: list[str] = known, inplace: bool = inplace, **kwargs: Any) -> Any:
            return experts.fused_experts_impl(**dict(zip(known, args, strict=False)), **kwargs, inplace=inplace)

        setattr(experts, name, run)
