"""What a run does, operation by operation, for telling whether a CUDA graph of it would do the same.

A graph replays the kernels that it saw, on the addresses and with the scalars that it saw. A recording holds just that
of a run: names, shapes, scalars, and of each tensor whether the run made it or where in memory it stood. While it is
made, what no graph can hold raises an IntegrityError: a value read by the host, a copy from host memory, a shape that
depends on data.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from sglang_llada.errors import IntegrityError
from sglang_llada.host.operations import ACTIVE

HOST_READS = (Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.__array__)  # a value's way out without an operation


@dataclass(slots=True)
class Recording:
    """The operations of a run, in order, as tuples that compare equal if a graph could not tell them apart."""

    operations: list[Any] = field(default_factory=list)
    made: dict[int, int] = field(default_factory=dict)  # storage of this run's tensors -> number of the operation
    outside: list[Tensor] = field(default_factory=list)  # kept, so that no other tensor takes their place in memory

    def add(self, name: str, arguments: Any, result: Any) -> None:
        """Note an operation once it has run."""
        described = self.describe(arguments)
        given = {address(t) for t in tensors(arguments)}
        for made in tensors(result):
            if address(made) not in given:
                self.made[address(made)] = len(self.operations)
        self.operations.append((name, described))

    def describe(self, value: Any) -> Any:
        """What a graph keeps of an argument."""
        if isinstance(value, Tensor):
            return (value.dtype, tuple(value.shape), value.stride(), value.storage_offset(), self._origin(value))
        if isinstance(value, list | tuple):
            return tuple(map(self.describe, value))
        if isinstance(value, dict):
            return tuple((key, self.describe(value[key])) for key in sorted(value))
        if value is None or isinstance(value, int | float | str | torch.dtype | torch.device | torch.layout):
            return value
        return type(value).__name__

    def _origin(self, tensor: Tensor) -> tuple[str, int]:
        if not tensor.numel():
            return ("empty", 0)
        where = address(tensor)
        if where in self.made:
            return ("made by", self.made[where])
        self.outside.append(tensor)
        return ("outside", where)

    def must_equal(self, captured: Recording) -> None:
        """Raise IntegrityError at the first operation that differs from the captured one."""
        for number, (want, got) in enumerate(zip(captured.operations, self.operations, strict=False)):
            if want != got:
                raise IntegrityError(f"operation {number} of a replayed step is {got}; captured was {want}")
        if len(captured.operations) != len(self.operations):
            raise IntegrityError(
                f"a replayed step has {len(self.operations)} operations; captured were {len(captured.operations)}"
            )


@contextmanager
def recording() -> Iterator[Recording]:
    """Write down what runs, and refuse what a capture would not allow."""
    recorded = Recording()
    ACTIVE.append(recorded)
    try:
        with no_host_reads(), Watch(recorded):
            yield recorded
    finally:
        ACTIVE.pop()


class Watch(TorchDispatchMode):
    """Sees every operation that reaches a kernel."""

    def __init__(self, recorded: Recording) -> None:
        super().__init__()
        self.recorded = recorded

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:  # in inference mode composite operations come here whole
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        refuse(func, args)
        result = func(*args, **kwargs)
        self.recorded.add(str(func), (args, kwargs), result)
        return result


class no_host_reads(TorchFunctionMode):
    """Refuses to bring a tensor's values to the host."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in HOST_READS:
            raise IntegrityError(f"{func.__name__} reads a tensor on the host within a captured step")
        return func(*args, **(kwargs or {}))


def refuse(operation: Any, args: Any) -> None:
    """Raise IntegrityError for an operation that no graph can hold."""
    if torch.Tag.data_dependent_output in operation.tags:
        raise IntegrityError(f"{operation} reads a tensor on the host within a captured step")
    masks = operation.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_)
    if torch.Tag.dynamic_output_shape in operation.tags and not masks or masks and has_mask(args[1]):
        raise IntegrityError(f"{operation} has a shape that depends on data within a captured step")
    if operation is torch.ops.aten.lift_fresh.default:
        raise IntegrityError("a tensor is made from host memory within a captured step")


def has_mask(indices: Any) -> bool:
    """Whether an index picks by truth values."""
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)


def address(tensor: Tensor) -> int:
    """Where a tensor's storage begins."""
    return tensor.untyped_storage().data_ptr()


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested lists, tuples, dicts and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item)
    elif is_dataclass(value):
        for item in fields(value):
            yield from tensors(getattr(value, item.name))
