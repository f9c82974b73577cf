"""`python -m hpkernels.info`: what is built, which backend each op would use here, and why not the others."""

from __future__ import annotations

import importlib
import os
import platform

import torch

from hpkernels import dispatch
from hpkernels._version import __version__

OPS = {
    "similarity_search": ("max_similarity", "topk_similarity", "pairs_above"),
    "contrastive": ("contrastive_stats", "contrastive_grad"),
    "group_lse": ("group_lse", "group_lse_grad"),
    "local_mix": ("neighbor_weights", "neighbor_weights_qk", "neighbor_mix"),
    "pair_bits": ("random_bits", "count_bits", "transpose_bits", "pairs_from_indices"),
    "cluster_assign": ("cluster_assign",),
    "normalize": ("normalize_rows",),
}
FORMS = {"contrastive": ("/dense", "/sparse")}  # of functions that have several, by op folder
ROWS, WIDTH = 50_176, 512  # of a call whose faster backend is shown


def _faster(choice: str, device: torch.device) -> str:
    """The faster backend, for bf16 rows of WIDTH, and how that is known."""
    backend, entry = dispatch.fastest(choice, (ROWS, WIDTH), torch.bfloat16, device)
    if entry is None:
        return f"{backend} (default)"
    measured = entry["measured"]
    source = "predicted" if not measured else "measured" if measured is True else f"measured, {measured}"
    times = (f"{name} {milliseconds:g}" for name, milliseconds in entry.get("ms", {}).items())
    return f"{backend} ({', '.join([source, *times])}{' ms' if 'ms' in entry else ''})"


def _cuda_line() -> str:
    missing = dispatch.MISSING["cuda"]
    if missing is not None:
        return missing
    extension = importlib.import_module("hpkernels._cuda")
    version = extension.cuda_version
    return f"built with CUDA {version // 1000}.{version % 1000 // 10} for {extension.archs.replace(';', ', ')}"


def _lines() -> list[str]:
    lines = [f"hpkernels {__version__}, torch {torch.__version__}, Python {platform.python_version()}"]
    missing = dispatch.why_not("cpu", torch.device("cpu"))
    if missing is None:
        extension = importlib.import_module("hpkernels._cpu")
        lines.append(f"_cpu: built; instruction set {extension.isa()} of {', '.join(extension.isas())}")
    else:
        lines.append(f"_cpu: {missing}")
    lines.append(f"_cuda: {_cuda_line()}")
    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        lines.append(f"cuda devices: {', '.join(devices)}")
    else:
        lines.append("cuda devices: none")
    override = os.environ.get("HPKERNELS_BACKEND")
    lines.append(f"HPKERNELS_BACKEND: {override or 'not set'}; threads: {torch.get_num_threads()}")
    for device in [torch.device("cpu")] + ([torch.device("cuda")] if torch.cuda.is_available() else []):
        lines += ["", f"{device.type} tensors"]
        try:
            chosen = dispatch.choose(device)
        except ValueError as error:
            chosen = f"none ({error})"
        except ImportError:  # the line of the extension says it
            chosen = "none"
        for folder, names in OPS.items():
            if chosen == dispatch.FASTEST:
                lines += [f"  {folder}", *(f"    {name}{form}: {_faster(name + form, device)}"
                                           for name in names for form in FORMS.get(folder, ("",)))]  # fmt: skip
            else:
                lines.append(f"  {folder} ({', '.join(names)}): {chosen}")
        for backend in dispatch.BACKENDS:
            reason = dispatch.why_not(backend, device)
            lines.append(f"    {backend}: {'available' if reason is None else 'no: ' + reason}")
    return lines


def main() -> None:
    print("\n".join(_lines()))


if __name__ == "__main__":
    main()
