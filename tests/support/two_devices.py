"""A host and pretended GPUs on one machine: the Triton interpreter runs their kernels on the CPU.

A tensor of a GPU says that it is on ``cuda:0`` or ``cuda:1``; its numbers are in host memory. Every torch function goes
through ``TwoDevices``, which follows the rules of CUDA tensors:

- a function whose tensors are on both GPUs, or a kernel of one that is launched while the other is the current one or
  on a stream of the other, raises;
- a function whose tensors are on the host and on a GPU raises, unless CUDA allows it (a CPU tensor of no dimensions in
  an elementwise function, indices on the CPU, ``copy_``, ``to``); so does a Triton kernel that is given a host tensor,
  and a CPU kernel that is given a device tensor;
- a tensor that is divided by a number of the host is multiplied by the number's reciprocal;
- every copy between the devices is noted, with whether the host waits for it. It does not wait for a copy from pinned
  memory, nor for one to pinned memory, if ``non_blocking`` says so;
- what a copy that was not waited for brings is not there before the next wait, and reading it raises; the memory that
  such a copy reads must not change before the next wait; the cache ops read and write pinned memory in the same way;
- a CUDA graph holds what was asked of the device while it was captured, and does it when it is replayed. Waiting for
  the device and copies that the host waits for are not permitted during the capture.

The device is asynchronous: every kernel takes a second of the device's time (``clock``) and none of the host's, and a
wait moves the host's clock to where the device is ready.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import triton.runtime.interpreter
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import layerskip_kernels.ops.triton
from layerskip_kernels import ops

__all__ = ["DEVICE", "OTHER", "Copy", "Seen", "TwoDevices", "on_device"]

DEVICE, OTHER = (torch.device("cuda", index) for index in range(2))
HOST = torch.device("cpu")
aten = torch.ops.aten
WAITING = {aten._local_scalar_dense, aten.equal, aten.nonzero, aten.masked_select, aten.bincount, aten._unique2}
SCALARS = {aten.fill_, aten.masked_fill_, aten.masked_fill, aten.index_fill_}  # take a host tensor of no dimensions
DIVISIONS = {aten.div: aten.mul.Tensor, aten.div_: aten.mul_.Tensor}
CUDA_OPS = {"copy_pages", "gather_kv", "scatter_kv"}
POISON = 0x7B  # each byte of memory that a copy has not reached yet


@dataclass(frozen=True)
class Copy:
    """A copy between the devices. ``blocking``: the host waits until it is done."""

    to_device: bool
    shape: tuple[int, ...]
    blocking: bool


@dataclass
class Seen:
    """What happened between the devices in some stretch of a program."""

    copies: list[Copy] = field(default_factory=list)
    waits: int = 0  # of the host for the device, blocking copies to the host included
    launches: list[str] = field(default_factory=list)  # of kernels, replayed ones included

    def to_host(self) -> list[Copy]:
        return [copy for copy in self.copies if not copy.to_device]

    def to_device(self) -> list[Copy]:
        return [copy for copy in self.copies if copy.to_device]


class OnDevice(Tensor):
    """A tensor of the GPU ``where``; ``numbers`` is the CPU tensor that holds its numbers."""

    numbers: Tensor
    where: torch.device

    @staticmethod
    def __new__(cls, numbers: Tensor, where: torch.device) -> OnDevice:
        tensor = Tensor._make_subclass(cls, numbers, False, dispatch_device=True, device_for_backend_keys=where)
        tensor.numbers, tensor.where = numbers, where
        return tensor

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        special = SPECIAL.get(getattr(func, "__name__", ""))
        if special is not None:
            return special(func, *args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _world().dispatch(func, args, kwargs or {})


def on_device(value: Any) -> bool:
    return isinstance(value, OnDevice)


def _where(*values: Any) -> torch.device | None:
    """The GPU that the tensors among the values are on; None: there are none of a GPU."""
    found = {leaf.where for leaf in tree_leaves(values) if on_device(leaf)}
    if len(found) > 1:
        raise RuntimeError("Expected all tensors to be on the same device, but found at least two devices, "
                           f"{' and '.join(sorted(map(str, found)))}!")  # fmt: skip
    return found.pop() if found else None


def _gpu(device: Any) -> torch.device | None:
    """A GPU with its index; None for anything else."""
    if device is None or torch.device(device).type != "cuda":
        return None
    index = torch.device(device).index
    return torch.device("cuda", _world().current_device if index is None else index)


def _numbers(value: Any) -> Any:
    return tree_map_only(OnDevice, lambda tensor: tensor.numbers, value)


# ---- functions whose Python side would ask for a real GPU ----


def _contiguous(func: Any, tensor: OnDevice, **kwargs: Any) -> Tensor:
    return tensor if tensor.is_contiguous() else tensor.clone(memory_format=torch.contiguous_format)


def _copy(func: Any, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    return _world().dispatch(aten.copy_.default, (target, source, non_blocking), {})


def _item(func: Any, tensor: OnDevice) -> Any:
    return _world().dispatch(aten._local_scalar_dense.default, (tensor,), {})


def _tolist(func: Any, tensor: OnDevice) -> Any:
    return tensor.to(HOST).tolist()


def _numpy(func: Any, tensor: OnDevice, *args: Any, **kwargs: Any) -> Any:
    raise TypeError(f"can't convert {DEVICE} device type tensor to numpy. Use Tensor.cpu() first")


def _get_item(func: Any, tensor: Tensor, index: Any) -> Any:
    world, advanced = _world(), _index_tensors(tensor, index)
    result = _numbers(tensor)[_numbers(index)]
    if advanced:
        world.refuse_capture("indexing with tensors")
    return OnDevice(result, tensor.where) if on_device(tensor) else result


def _set_item(func: Any, tensor: Tensor, index: Any, value: Any) -> None:
    world, _ = _world(), _where(tensor, index, value)
    if not _index_tensors(tensor, index):
        target = _numbers(tensor)[_numbers(index)]
        target = OnDevice(target, tensor.where) if on_device(tensor) else target
        if isinstance(value, Tensor):
            target.copy_(value)
        else:
            target.fill_(value)
        return
    world.refuse_capture("indexing with tensors")
    if isinstance(value, Tensor) and on_device(value) != on_device(tensor):
        if value.dim() > 0:
            raise RuntimeError(
                f"index_put_: tensors on different devices: self on {tensor.device}, values on {value.device}"
            )
        value = value.to(tensor.device)
    _numbers(tensor)[_numbers(index)] = _numbers(value)


def _index_tensors(tensor: Tensor, index: Any) -> bool:
    """Whether the index holds tensors or lists, after a look at where they are."""
    _where(tensor, index)
    parts = index if isinstance(index, tuple) else (index,)
    advanced = [part for part in parts if isinstance(part, Tensor | list) and getattr(part, "dim", lambda: 1)() > 0]
    for part in advanced:
        if on_device(part) and not on_device(tensor):
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        if on_device(tensor) and not on_device(part):
            _world().copied(to_device=True, shape=tuple(torch.as_tensor(part).shape), blocking=True)
        elif isinstance(part, Tensor) and part.dtype == torch.bool:
            _world().copied(to_device=False, shape=(), blocking=True)  # how many there are
    return bool(advanced)


def _as(kind: type) -> Callable[..., Any]:
    return lambda func, tensor: kind(_item(func, tensor))


SPECIAL: dict[str, Callable[..., Any]] = {
    "contiguous": _contiguous, "copy_": _copy, "item": _item, "tolist": _tolist, "numpy": _numpy,
    "__int__": _as(int), "__index__": _as(int), "__float__": _as(float), "__bool__": _as(bool),
    "__getitem__": _get_item, "__setitem__": _set_item,
}  # fmt: skip


class _HostReads(TorchFunctionMode):
    """Reads of host memory that dispatch nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("tolist", "numpy", "data_ptr", "__array__") and not on_device(args[0]):
            _world().check_arrived(args[0])
        return func(*args, **(kwargs or {}))


# ---- the two devices ----


def _world() -> TwoDevices:
    assert TwoDevices.current is not None, "a tensor of the pretended device outlived the fixture two_devices"
    return TwoDevices.current


class TwoDevices(TorchDispatchMode):
    """The pretended device, what was asked of it, and the clocks. One at a time: the fixture ``two_devices``."""

    current: TwoDevices | None = None

    def __init__(self) -> None:
        super().__init__()
        self.seen = Seen()
        self.current_device = 0
        self.capture_stream: _Stream | None = None  # torch's own, made for the first capture
        self.capture_error_mode: str | None = None  # of the last capture
        self.failing_captures = 0  # how many of the next captures fail
        self._graph: Graph | None = None  # being captured
        self._pinned: dict[int, Tensor] = {}
        self._arriving: dict[int, list[tuple[Tensor, Tensor]]] = {}  # by storage: where to, what
        self._leaving: list[tuple[Tensor, Tensor]] = []  # memory that copies read, and what they must find
        self._host_time = self._device_time = 0.0

    @contextmanager
    def watched(self) -> Iterator[Seen]:
        """What happens from here to the end of the block."""
        before, self.seen = self.seen, Seen()
        try:
            yield self.seen
        finally:
            self.seen = before

    def clock(self) -> float:
        """The host's time in seconds."""
        return self._host_time

    @property
    def ready_at(self) -> float:
        """When the device will have done what was asked so far."""
        return max(self._host_time, self._device_time)

    # ---- what is asked of the device ----

    def launched(self, name: str, run: Callable[[], Any]) -> None:
        """A kernel: run now, or noted in the graph that is being captured."""
        if self._graph is not None:
            self._graph.calls.append((name, run))
            return
        self.seen.launches.append(name)
        self._device_time = self.ready_at + 1
        run()

    def wait(self, counted: bool = False) -> None:
        """The host waits for the device. Counted if there was something to wait for, or if the caller says so."""
        self.refuse_capture("waiting for the device")
        self.seen.waits += counted or self._device_time > self._host_time or bool(self._arriving)
        self._host_time = self.ready_at
        arriving, self._arriving = self._arriving, {}
        for target, brought in (pair for pairs in arriving.values() for pair in pairs):
            target.copy_(brought)
        leaving, self._leaving = self._leaving, []
        for source, before in leaving:
            if not torch.equal(source.view(torch.uint8), before.view(torch.uint8)):
                raise RuntimeError("pinned memory changed while a copy to the device was reading it")

    def refuse_capture(self, what: str) -> None:
        if self._graph is not None:
            raise RuntimeError(f"{what}: operation not permitted when stream is capturing")

    def copied(self, to_device: bool, shape: tuple[int, ...], blocking: bool) -> None:
        """A copy between the devices is noted and, if it is blocking, waited for."""
        if blocking:
            self.refuse_capture("a copy that the host waits for")
        self.seen.copies.append(Copy(to_device, shape, blocking))
        if blocking:
            self.wait(counted=True)

    # ---- copies ----

    def pin(self, tensor: Tensor) -> Tensor:
        self._pinned[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def is_pinned(self, tensor: Tensor) -> bool:
        return not on_device(tensor) and tensor.untyped_storage().data_ptr() in self._pinned

    def check_arrived(self, tensor: Any) -> None:
        if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() in self._arriving:
            raise RuntimeError("host memory was read before the copy to it was waited for")

    def copy(self, target: Tensor, source: Tensor, non_blocking: bool = False) -> None:
        """target.copy_(source) from one device to the other."""
        to_device, host = on_device(target), source if on_device(target) else target
        blocking = not (non_blocking and self.is_pinned(host))
        if to_device:
            self.check_arrived(source)
        self.copied(to_device, tuple(target.shape), blocking)
        if to_device and not blocking:
            self._leaving.append((source.contiguous(), source.clone(memory_format=torch.contiguous_format)))
        if to_device or blocking:
            _numbers(target).copy_(_numbers(source))
            return
        self.arrives(target, source.numbers.clone().to(target.dtype))

    def _to_copy(self, source: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """``Tensor.to``: of another dtype, on another device, or both."""
        device = kwargs.pop("device", None) or source.device
        non_blocking = kwargs.pop("non_blocking", False)
        kwargs.pop("pin_memory", None)
        here, there = _where(source), _gpu(device)
        if here and there and here != there:
            raise RuntimeError(f"a copy from {here} to {there}: nothing of this package should need one")
        if here == there:
            result = aten._to_copy.default(_numbers(source), **kwargs)
            return OnDevice(result, there) if there else result
        result = torch.empty_like(source if not here else source.numbers, dtype=kwargs.get("dtype") or source.dtype)
        if there:
            result = OnDevice(result, there)
        elif non_blocking:
            self.pin(result)
        self.copy(result, source, non_blocking)
        return result

    # ---- every function ----

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.dispatch(func, args, kwargs or {})

    def dispatch(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0].where
        packet = func._overloadpacket
        if packet is aten._to_copy:
            return self._to_copy(args[0], dict(kwargs))
        if packet is aten._pin_memory:
            return self.pin(args[0].clone())
        if packet is aten.is_pinned:
            return self.is_pinned(args[0])
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if packet is aten.copy_ and on_device(args[0]) != on_device(args[1]):
            self.copy(*args, **kwargs)
            return args[0]
        device, kwargs = kwargs.get("device"), dict(kwargs)
        if device is not None and torch.device(device).type != "meta":
            kwargs["device"] = HOST
        pinned = kwargs.get("pin_memory") and kwargs.pop("pin_memory")
        for tensor in tensors:
            self.check_arrived(tensor)
        where = _where(tensors, [] if _gpu(device) is None else OnDevice(torch.empty(0), _gpu(device)))
        if where is None:
            result = func(*args, **kwargs)
            return self.pin(result) if pinned else result
        self._check_devices(func, packet, tensors)
        if func.namespace == "layerskip":
            return self._move(func, packet.__name__, args)
        if packet in DIVISIONS and args[0].is_floating_point() and not (on_device(args[1]) or kwargs):
            func, args = DIVISIONS[packet], (args[0], float(1 / torch.as_tensor(args[1], dtype=torch.float32)))
        if packet in WAITING:
            self.copied(to_device=False, shape=(), blocking=True)  # what it found
        return self._run(func, args, kwargs, device, where)

    def _move(self, func: Any, name: str, args: Any) -> None:
        """A cache op: a kernel that reads and writes pinned host memory by itself."""
        numbers = list(_numbers(args))
        if name == "gather_kv":
            for i in (i for i in (3, 4) if not on_device(args[i])):
                numbers[i] = torch.empty_like(args[i])
                self.arrives(args[i], numbers[i])
        elif name == "scatter_kv":
            self._leaving += [(tensor, tensor.clone()) for tensor in args[2:4] if not on_device(tensor)]
        self.launched(name, lambda: func(*numbers))

    def arrives(self, target: Tensor, brought: Tensor) -> None:
        """Host memory gets its numbers with the next wait."""
        with torch.utils._python_dispatch._disable_current_modes():  # parts of one memory may be on their way
            target.view(torch.uint8).fill_(POISON)
        self._arriving.setdefault(target.untyped_storage().data_ptr(), []).append((target, brought))

    def _run(self, func: Any, args: Any, kwargs: dict[str, Any], device: Any, where: torch.device) -> Any:
        """On the numbers; the results are the device's, the arguments that come back are themselves."""
        host_args, host_kwargs = _numbers(args), _numbers(kwargs)
        result = func(*host_args, **host_kwargs)
        given = {id(t.numbers): t for t in tree_leaves((args, kwargs)) if on_device(t)}
        views = {t.untyped_storage().data_ptr() for t in tree_leaves((host_args, host_kwargs)) if isinstance(t, Tensor)}
        if self._graph is not None and "empty" not in func._overloadpacket.__name__:
            outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
            fresh = [t for t in outputs if t.untyped_storage().data_ptr() not in views]
            if fresh or func._schema.is_mutable:
                self._graph.calls.append(("", lambda: _again(func, host_args, host_kwargs, outputs)))
        if device is not None and torch.device(device).type == "cpu":
            return result
        return tree_map_only(Tensor, lambda t: given[id(t)] if id(t) in given else OnDevice(t, where), result)

    def _check_devices(self, func: Any, packet: Any, tensors: list[Tensor]) -> None:
        if func.namespace == "layerskip":
            if packet.__name__ not in CUDA_OPS:
                raise NotImplementedError(f"Could not run '{func.name()}' with arguments from the 'CUDA' backend")
            strange = [t for t in tensors if not on_device(t) and not self.is_pinned(t)]
        elif torch.Tag.pointwise in func.tags or packet in SCALARS:
            strange = [t for t in tensors if not on_device(t) and t.dim() > 0]
        else:
            strange = [t for t in tensors if not on_device(t)]
        if strange or (tensors and not any(map(on_device, tensors))):
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
                f"({func.name()}, shapes {[list(t.shape) for t in strange]} on the cpu)"
            )


def _again(func: Any, args: Any, kwargs: Any, outputs: list[Tensor]) -> None:
    """One function of a graph that is replayed, into the memory of its capture."""
    results = [t for t in tree_leaves(func(*args, **kwargs)) if isinstance(t, Tensor)]
    for output, result in zip(outputs, results, strict=True):
        if output.data_ptr() != result.data_ptr():
            output.copy_(result)


# ---- torch.cuda ----


class Graph:
    """torch.cuda.CUDAGraph: what was asked of the device during its capture."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Callable[[], Any]]] = []
        self.captured = False

    def replay(self) -> None:
        assert self.captured, "a graph without a capture was replayed"
        for name, call in self.calls:
            if name:
                _world().launched(name, call)
            else:
                call()


@contextmanager
def _capture(graph: Graph, pool: Any = None, stream: Any = None, capture_error_mode: str = "global") -> Iterator[None]:
    world = _world()
    world.wait()
    world.capture_stream = world.capture_stream or _Stream()
    _on_current(stream or world.capture_stream)
    world._graph, world.capture_error_mode = graph, capture_error_mode
    try:
        yield
        if world.failing_captures:
            world.failing_captures -= 1
            raise torch.OutOfMemoryError("CUDA out of memory while capturing")
        graph.captured = True
    finally:
        world._graph = None


class Event:
    """torch.cuda.Event."""

    def __init__(self, enable_timing: bool = False, **_: Any) -> None:
        self.time: float | None = None
        self.where: torch.device | None = None
        self._timing = enable_timing

    def record(self, stream: Any = None) -> None:
        where = _gpu("cuda") if stream is None else stream.where
        if self.where not in (None, where):
            raise RuntimeError(f"an event of {self.where} was recorded on {where}")
        self.time, self.where = _world().ready_at, where

    def synchronize(self) -> None:
        if self.time is not None and self.time > _world().clock():
            _world().wait()

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds."""
        if self.time is None or end.time is None or not (self._timing and end._timing):
            raise ValueError("both events must be recorded, with timing enabled")
        if max(self.time, end.time) > _world().clock():
            raise RuntimeError("device not ready")
        return (end.time - self.time) * 1e3


class _Stream:
    def __init__(self, device: Any = None) -> None:
        self.where = _gpu("cuda" if device is None else device)

    def wait_event(self, event: Event) -> None:
        """There is one stream of each GPU, whose work is done in order."""

    def synchronize(self) -> None:
        _world().wait()


def _on_current(stream: _Stream) -> None:
    if stream.where != _gpu("cuda"):
        raise RuntimeError(f"a stream of {stream.where} is used while {_gpu('cuda')} is the current device")


@contextmanager
def _current(device: Any) -> Iterator[None]:
    """torch.cuda.device"""
    world, index = _world(), device if isinstance(device, int) else torch.device(device).index
    before, world.current_device = world.current_device, world.current_device if index is None else index
    try:
        yield
    finally:
        world.current_device = before


def _launcher(execute: Callable[..., Any]) -> Callable[..., Any]:
    """triton.runtime.interpreter.GridExecutor.__call__ for kernels of the device."""

    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        world, name = _world(), self.fn.__name__
        for tensor in (t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)):
            if not on_device(tensor):
                raise ValueError(f"{name}: pointer argument cannot be accessed from Triton (cpu tensor?)")
        where = _where(args, kwargs)
        if where != _gpu("cuda"):
            raise RuntimeError(f"{name} was launched on cuda:{world.current_device}, its tensors are on {where}")
        arguments = _numbers(args), _numbers(kwargs)

        def run() -> None:
            with torch.utils._python_dispatch._disable_current_modes(), torch._C.DisableTorchFunction():
                execute(self, *arguments[0], **arguments[1])

        world.launched(name, run)

    return call


@contextmanager
def two_devices() -> Iterator[TwoDevices]:
    """The triton backend on the pretended device. Tensors of it and models on it must not outlive the block."""
    world = TwoDevices()
    lifts_only_host_tensors = torch._C._only_lift_cpu_tensors()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TwoDevices, "current", world)
        patch.setattr(layerskip_kernels.ops.triton, "default_device", lambda: _gpu("cuda"))
        patch.setattr(triton.runtime.interpreter.GridExecutor, "__call__", _launcher(
            triton.runtime.interpreter.GridExecutor.__call__
        ))  # fmt: skip
        for name, value in {
            "_lazy_init": lambda: None, "device": _current, "current_device": lambda: world.current_device,
            "synchronize": lambda device=None: world.wait(), "Event": Event, "CUDAGraph": Graph, "graph": _capture,
            "current_stream": _Stream, "Stream": _Stream, "device_count": lambda: 2,
        }.items():  # fmt: skip
            patch.setattr(torch.cuda, name, value)
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") makes a host tensor and copies it
        ops._triton.cache_clear()
        try:
            with _HostReads(), world:
                yield world
        finally:
            torch._C._set_only_lift_cpu_tensors(lifts_only_host_tensors)
            ops._triton.cache_clear()
