"""One contender in a process of its own: takes one JSON request a line, answers one JSON line.

Requests: {"do": "prepare", "case", "contender", "shape", "device", "dtype", "threads"}, then any of {"do": "run"},
{"do": "memory"}, {"do": "stages", "repetitions"}; {"do": "density", "shape", "device"} and {"do": "versions"} at any
time. The runner ends the process by closing its input.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch

import hpkernels
from benchmarks.cases import CASES, Case, step_inputs
from benchmarks.features import density
from benchmarks.plan import Shape

FLUSH_BYTES = 1 << 29  # more than any GPU's last-level cache


class Worker:
    case: Case
    contender: str
    shape: Shape
    device: str

    def prepare(self, case: str, contender: str, shape: dict, device: str, dtype: str, threads: int) -> dict:
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        self.case, self.contender, self.device = CASES[case], contender, device
        self.dtype = getattr(torch, dtype)
        self.shape = _shape(shape)
        self.job = self.case.contenders[contender]
        self.inputs = self.case.inputs(self.shape, device, self.dtype)
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device) if device == "cuda" else None
        return {
            "flop": self.case.flop(self.shape) if self.case.flop else None,
            "nbytes": self.case.nbytes(self.shape, self.dtype.itemsize) if self.case.nbytes else None,
        }

    def run(self) -> dict:
        """One repetition: seconds, and the page faults it took."""
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        if self.device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
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
        """Rise of the peak over what the inputs hold, in one repetition; libraries are warmed on a small shape first.

        The results (gradients, bits) count as extra memory. On the CPU: resident bytes of this process.
        """
        small = Shape(2, (5, 5), self.shape.channels, self.shape.code, 64, self.shape.heads)
        self.job(self.case.inputs(small, self.device, self.dtype))
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
        """Seconds of each hpkernels op in a repetition (median over repetitions), and of a whole repetition.

        Read from torch's profiler: the ops called by the step, told apart by the width of their first input.
        """
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.device == "cuda")
        samples = defaultdict(list)
        for _ in range(repetitions):
            with profile(activities=activities, record_shapes=True) as trace:
                seconds = self.run()["seconds"]
            samples["step"].append(seconds)
            spent = defaultdict(float)
            for event in trace.events():
                if event.name.startswith("hpkernels::") and not _inside_op(event):
                    on_device = event.device_time_total if self.device == "cuda" else event.cpu_time_total
                    spent[_stage(event)] += on_device / 1e6
            for stage, value in spent.items():
                samples[stage].append(value)
        return {"stages": {stage: sorted(values)[len(values) // 2] for stage, values in samples.items()}}

    def density(self, shape: dict, device: str) -> dict:
        return density(step_inputs(_shape(shape), device, torch.float32))

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


def _shape(fields: dict) -> Shape:
    return Shape(**{name: tuple(v) if isinstance(v, list) else v for name, v in fields.items() if name != "rows"})


def _inside_op(event) -> bool:
    parent = event.cpu_parent
    while parent is not None:
        if parent.name.startswith("hpkernels::"):
            return True
        parent = parent.cpu_parent
    return False


def _stage(event) -> str:
    name = event.name.removeprefix("hpkernels::")
    if name in ("max_similarity", "pairs_above"):
        return f"{name}/{event.input_shapes[0][-1]}"
    return name


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
