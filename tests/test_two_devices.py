"""The pretended device itself follows the rules of CUDA tensors (tests/support/two_devices.py)."""

import pytest
import torch
import triton
import triton.language as tl

from support.two_devices import DEVICE, OTHER, Copy


@pytest.fixture
def pair(two_devices):
    """Equal numbers on the host and on the device."""
    host = torch.arange(6.0).view(2, 3)
    return host, host.to(DEVICE)


@pytest.mark.parametrize(
    "mix",
    [
        lambda host, device: device + host,
        lambda host, device: torch.cat([device, host]),
        lambda host, device: device.gather(1, torch.tensor([[0]])),
        lambda host, device: torch.equal(host, device),
        lambda host, device: host[torch.tensor([0], device=DEVICE)],
        lambda host, device: host.__setitem__(([0, 1],), device),
        lambda host, device: device.__setitem__(([0, 1],), host),
        lambda host, device: torch.tensor(1.0, device=DEVICE) + host,
        lambda host, device: torch.ops.layerskip.exp(device),
    ],
)
def test_mixing_devices_raises(pair, mix):
    with pytest.raises((RuntimeError, NotImplementedError), match=r"device|'CUDA' backend"):
        mix(*pair)


@pytest.mark.parametrize(
    "mix",
    [
        lambda one, two: one + two,
        lambda one, two: one.copy_(two),
        lambda one, two: one.to(two.device),
        lambda one, two: one.__setitem__(0, two[0]),
        lambda one, two: one[two[0].long()],
        lambda one, two: _add_one_kernel[(1,)](two, N=2),
    ],
)
def test_mixing_gpus_raises(pair, mix):
    host, device = pair
    other = host.to(OTHER)
    assert (device.device, other.device, other[0].device, (other + 1).device) == (DEVICE, *[OTHER] * 3)
    with pytest.raises(RuntimeError, match=r"cuda:[01] .*cuda:[01]|cuda:1"):
        mix(device, other)


def test_what_cuda_allows(pair):
    host, device = pair
    assert torch.equal((device + torch.tensor(1.0)).cpu(), host + 1)
    assert torch.equal(device[torch.tensor([1])].cpu(), host[1:])
    device[0] = host[1]
    host[0] = device[1]
    device[[0, 1], 0] = torch.tensor(7.0)
    assert torch.equal(device.cpu(), torch.tensor([[7.0, 4, 5], [7, 4, 5]]))
    assert host[0].tolist() == [3, 4, 5] and device[0].tolist() == [7, 4, 5]
    assert (device.device, device.is_cuda, host.is_cuda) == (DEVICE, True, False)


def test_a_number_of_the_host_divides_by_its_reciprocal(two_devices):
    x = torch.arange(1.0, 400.0)
    device, reciprocal = x.to(DEVICE), 1 / torch.tensor(127.0)
    assert not torch.equal(x / 127, x * reciprocal)
    for divided in (device / 127, device / torch.tensor(127.0), device.clone().div_(127)):
        assert torch.equal(divided.cpu(), x * reciprocal)
    for divided in (device / torch.full_like(device, 127), device / torch.tensor(127.0, device=DEVICE)):
        assert torch.equal(divided.cpu(), x / 127)
    halves = device.bfloat16() / 127  # multiplied in fp32
    assert torch.equal(halves.cpu(), (x.bfloat16().float() * reciprocal).bfloat16()) and halves.dtype == torch.bfloat16


def test_copies_and_waits_are_counted(two_devices):
    host, pinned = torch.ones(3), torch.ones(2).pin_memory()
    with two_devices.watched() as seen:
        device = host.to(DEVICE)
        device[:2].copy_(pinned, non_blocking=True)
        torch.tensor([1], device=DEVICE)
        int(device[0])
        device.tolist()
        device.clone().sum()
    expected = [((3,), True), ((2,), False), ((1,), True)]
    assert seen.to_device() == [Copy(True, *copy) for copy in expected]
    assert seen.to_host() == [Copy(False, (), True), Copy(False, (3,), True)]
    assert seen.waits == 4


def test_what_was_not_waited_for_is_not_there(two_devices):
    device = torch.arange(3, device=DEVICE)
    copy = device.to("cpu", non_blocking=True)
    for read in (copy.tolist, copy.sum, lambda: copy[0], copy.numpy, lambda: int(copy[1])):
        with pytest.raises(RuntimeError, match="read before the copy to it was waited for"):
            read()
    torch.cuda.synchronize()
    assert copy.tolist() == [0, 1, 2]


def test_memory_must_not_change_while_a_copy_reads_it(two_devices):
    pinned = torch.ones(2).pin_memory()
    pinned.to(DEVICE, non_blocking=True)
    pinned.zero_()
    with pytest.raises(RuntimeError, match="changed while a copy"):
        torch.cuda.synchronize()


@triton.jit
def _add_one_kernel(x_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    tl.store(x_ptr + offs, tl.load(x_ptr + offs) + 1)


def test_kernels_take_the_devices_time_and_its_tensors(two_devices):
    device = torch.zeros(4, device=DEVICE)
    _add_one_kernel[(1,)](device, N=4)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in "se")
    start.record()
    _add_one_kernel[(1,)](device, N=4)
    end.record()
    assert two_devices.clock() == 0
    with pytest.raises(RuntimeError, match="not ready"):
        start.elapsed_time(end)
    assert device.tolist() == [2] * 4
    assert (two_devices.clock(), start.elapsed_time(end)) == (2, 1000)
    with pytest.raises(ValueError, match="cpu tensor"):
        _add_one_kernel[(1,)](torch.zeros(4), N=4)
    two_devices.current_device = 1
    with pytest.raises(RuntimeError, match="launched on cuda:1"):
        _add_one_kernel[(1,)](device, N=4)


def test_a_graph_does_when_it_is_replayed_what_its_capture_saw(two_devices):
    x, y = torch.zeros(4, device=DEVICE), torch.zeros(4, device=DEVICE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _add_one_kernel[(1,)](x, N=4)
        y.copy_(x)
        doubled = x * 2
        with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
            x.cpu()
    assert not x.any()
    x.fill_(5)
    for _ in range(2):
        graph.replay()
    assert (x[0].item(), y[0].item(), doubled[0].item()) == (7, 7, 14)
