"""One contender in a process of its own: takes one JSON request a line, answers one JSON line.

Requests: {"do": "prepare", "kind", "peer", "shape", "device", "dtype", "threads"}, then any of {"do": "run"},
{"do": "memory"}, {"do": "stages", "repetitions"}; {"do": "gate", ...}, {"do": "density", ...} and {"do": "versions"} at
any time. The runner ends the process by closing its input.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
import resource
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

import hpkernels
from benchmarks import checks, peers, stages
from benchmarks.cases import KINDS
from benchmarks.features import density, one_positive_pool
from benchmarks.kinds import Kind, make_shaped
from benchmarks.plan import Shape

FLUSH_BYTES = 1 << 29  # more than any GPU's last-level cache
WARM_PRODUCTS, WARM_SIDE = 50, 4096  # about 10 ms of a large GPU at full load


class Worker:
    kind: Kind
    shape: Shape
    device: str

    def prepare(self, kind: str, peer: str, shape: dict, device: str, dtype: str, threads: int) -> dict:
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        self.kind, self.device, self.dtype = KINDS["step" if kind == "stages" else kind], device, getattr(torch, dtype)
        self.shape, self.job = Shape.from_dict(shape), self.kind.contenders[peer]
        self.compiled = peer.endswith("-compiled")
        self.inputs = self.kind.inputs(self.shape, device, self.dtype)
        if device == "cuda":
            self.flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
            self.load = torch.randn(WARM_SIDE, WARM_SIDE, device=device, dtype=torch.bfloat16)
        return {
            "flop": self.kind.flop(self.shape) if self.kind.flop else None,
            "bytes": self.kind.nbytes(self.shape, self.dtype.itemsize) if self.kind.nbytes else None,
        }

    def run(self) -> dict:
        """One repetition: seconds, and the page faults it took.

        On a GPU the chip is first put under load, as others had their turn before and it may have slowed down, then
        its last-level cache is overwritten.
        """
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        if self.device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            for _ in range(WARM_PRODUCTS):
                torch.mm(self.load, self.load)
            self.flush.zero_()
            begin.record()
            self.job(self.inputs)
            end.record()
            torch.cuda.synchronize()
            seconds = begin.elapsed_time(end) / 1e3
        else:
            started = time.perf_counter()
            self.job(self.inputs)
            seconds = time.perf_counter() - started
        return {"seconds": seconds, "faults": resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults}

    def memory(self) -> dict:
        """Rise of the peak over what the inputs hold, in one repetition, the libraries warm.

        The results (gradients, bits) count as extra memory. On the CPU: resident bytes of this process. Warmed on a
        small shape; what is compiled for its shape, on inputs of the same shape.
        """
        shape = self.shape if self.compiled else replace(self.shape, images=2, grid=(5, 5), pool=64)
        self.job(self.kind.inputs(shape, self.device, self.dtype))
        gc.collect()
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.job(self.inputs)
            torch.cuda.synchronize()
            return {"peak_bytes": torch.cuda.max_memory_allocated() - before}
        _trim_heap()
        before = _resident_bytes()
        self.job(self.inputs)
        return {"peak_bytes": max(0, _peak_bytes() - before)}

    def stages(self, repetitions: int) -> dict:
        """Seconds of each stage of a step and of the whole, by benchmarks.stages."""
        batch = self.inputs.batch
        pools = {
            False: (batch.pool, batch.head_pool),
            True: (one_positive_pool(batch.features), one_positive_pool(batch.head_features)),
        }

        def prepare(few: bool) -> None:
            batch.pool, batch.head_pool = pools[few]

        return stages.measure(lambda: self.run()["seconds"], self.device, prepare, repetitions)

    def gate(self, kind: str, peer: str, device: str, dtype: str, rate: float) -> dict:
        torch.set_num_threads(1)
        return checks.gate(kind, peer, device, getattr(torch, dtype), rate)

    def density(self, shape: dict, device: str, panels: int) -> dict:
        """Shares of the pairs and of the tiles that are positives, from the inputs of a step."""
        return density(make_shaped(Shape.from_dict(shape), device, torch.float32), panels)

    def versions(self) -> dict:
        """What ran: never the machine's name."""
        from hpkernels import dispatch

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        found = {
            "hpkernels": hpkernels.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.machine()}",
            "cpu": _cpu_model(),
            "cpus": os.cpu_count(),
            "backend": dispatch.choose(torch.device("cpu")),
            "tuning": Path(os.environ["HPKERNELS_TUNING"]).name if os.environ.get("HPKERNELS_TUNING") else "as shipped",
            "peers": {peer: peers.version(peer) for peer in peers.PACKAGES},
        }
        if found["backend"] == "cpu":
            from hpkernels import _cpu

            found["cpu_isa"] = _cpu.isa()
        if device.type == "cuda":
            import triton

            found |= {
                "gpu": torch.cuda.get_device_name(),
                "cuda": torch.version.cuda,
                "triton": triton.__version__,
                "gpu_backend": dispatch.choose(device),
            }
        return found


def _trim_heap() -> None:
    """Give freed memory back, so that what is reused from the heap counts like what is fresh."""
    if sys.platform == "linux":
        try:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        except (OSError, AttributeError):  # no glibc: the heap is what it is
            return


def _resident_bytes() -> int:
    """Resident bytes now. On Linux the recorded peak is first reset to them."""
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")
        return _status_bytes("VmRSS")
    return _peak_bytes()


def _peak_bytes() -> int:
    if sys.platform == "linux":
        return _status_bytes("VmHWM")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def _cpu_model() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def main() -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # a library that prints must not break the protocol
    worker = Worker()
    for line in sys.stdin:
        request = json.loads(line)
        answer = getattr(worker, request.pop("do"))(**request)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
