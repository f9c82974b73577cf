"""The instrument: what `benchmarks.dry` counts is what is there, and a call that waits for the device is an error."""

import pytest
import torch

pytest.importorskip("triton")
import hpkernels as hk
from benchmarks import dry

PIECE = 512


def test_memory_is_counted_storage_by_storage():
    there = dry.like_gpu(1 << 20, dtype=torch.float32)

    def run():
        a = there * 2  # 4 MiB
        b = a.view(-1, 16)[3:]  # no memory of its own
        c = torch.empty(3, dtype=torch.int64, device=there.device)  # one piece
        del a, c
        d = b.new_zeros(1 << 20)  # 4 MiB beside what b keeps alive
        del b
        torch.empty(1 << 20, dtype=torch.int8, device=d.device)  # 1 MiB

    step = dry.follow(run)
    assert step.peak_bytes == 8 << 20 and step.bytes_now == 0
    assert [call.kind for call in step.calls] == ["work", "view", "view", "memory", "work", "memory"]


def test_small_tensors_take_whole_pieces():
    held = []
    step = dry.follow(lambda: held.extend(torch.ones(n, device=dry.GPU) for n in (1, 128, 129)))
    assert step.peak_bytes == step.bytes_now == 4 * PIECE


def test_tensors_say_that_they_are_on_a_gpu():
    def run():
        for x in (given, given.float(), torch.zeros(3, device="cuda"), torch.arange(3, device=dry.GPU)[1:]):
            assert x.is_cuda and not x.is_cpu and x.device == dry.GPU and not x.is_meta
        assert given[1:].data_ptr() == given.data_ptr() + 2 * 8 and given.data_ptr() % PIECE == 0
        assert torch.cuda.get_device_properties(given.device).multi_processor_count == dry.PROCESSORS

    given = dry.like_gpu(4, 8)
    dry.follow(run)
    assert given.is_meta


WAITING = {
    "a number": lambda x: x.sum().item(),
    "a branch": lambda x: 1 if (x > 0).any() else 0,
    "a float": lambda x: float(x[0, 0]),
    "a list": lambda x: x[0].tolist(),
    "a copy to the host": lambda x: x.cpu(),
    "a copy from the host": lambda x: torch.ones(4).to(x.device),
    "a tensor of numbers of the host": lambda x: torch.tensor([1.0, 2.0], device=x.device),
    "nonzero": lambda x: (x > 0).nonzero(),
    "a mask as an index": lambda x: x[x > 0],
    "unique": lambda x: x.unique(),
    "repeats": lambda x: torch.repeat_interleave(x.long().flatten()),
}


@pytest.mark.parametrize("what", WAITING)
def test_waiting_is_an_error(what):
    with pytest.raises((dry.Waits, RuntimeError, NotImplementedError), match="waits|meta"):
        dry.follow(lambda: WAITING[what](dry.like_gpu(4, 8)))


def test_nothing_stays_patched():
    before = (torch.cuda.get_device_capability, torch.cuda.device, hk.dispatch.MISSING["cuda"])
    dry.loss_step(0.02, images=1, tokens=128)
    assert before == (torch.cuda.get_device_capability, torch.cuda.device, hk.dispatch.MISSING["cuda"])
    z = torch.randn(6, 4, requires_grad=True)
    hk.hidden_positive_loss(z, torch.randn(6, 4), torch.randn(2, 4)).backward()
    assert z.grad is not None and z.is_cpu


@pytest.mark.parametrize("gpu_backend", ["triton", "cuda"])
@pytest.mark.parametrize("rate", [0.02, 1.0])
def test_of_a_gpu(cuda, rate, gpu_backend):
    """The real peak lies above what is counted by no more than what libraries take for themselves."""
    reason = hk.dispatch.why_not(gpu_backend, cuda)
    if reason is not None:
        pytest.skip(reason)
    shape = dict(images=8, tokens=784)
    expected = dry.loss_step(rate, gpu_backend, **shape).peak_bytes
    generator = torch.Generator(cuda).manual_seed(0)

    def rows(n, width):
        return torch.randn(n, width, generator=generator, device=cuda).bfloat16()

    z, z_local = (rows(8 * 784, 512).requires_grad_() for _ in range(2))
    given = dict(features=rows(8 * 784, 384), pool=rows(2048, 384), head_features=rows(8 * 784, 512))
    given |= dict(head_pool=rows(2048, 512), head_weight=0.5, z_local=z_local, tokens_per_image=784)
    for _ in range(2):
        z.grad = z_local.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        hk.hidden_positive_loss(z, negative_rate=rate, seed=1, backend=gpu_backend, **given).backward()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    assert expected <= peak <= expected + (48 << 20)
