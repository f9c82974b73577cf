"""What the compiler says of a kernel, and what a shipped configuration may not do."""

from __future__ import annotations

import re
import subprocess
import tempfile

import triton

from tests.triton_kernels.offsets import narrow_offsets

# Bytes of a thread that older Tritons keep on the stack, and the newest does not. Tiles that spill nothing there make
# logits twice, or do not suit the other targets.
SPILLS = {
    ("3.5", "80", "_contrastive_listed_grad_kernel"): 8,
    ("3.5", "90", "_contrastive_grad_kernel"): 32,
    ("3.5", "90", "_contrastive_triangle_stats_kernel"): 8,
    ("3.6", "80", "_contrastive_listed_stats_kernel"): 8,
    ("3.6", "80", "_topk_similarity_panel_kernel"): 8,
    ("3.6", "90", "_contrastive_group_lse_kernel"): 8,
}
SHARED_LIMIT = {"80": 163 * 1024, "90": 227 * 1024, "gfx942": 64 * 1024}
_LOAD_16 = (
    r"cp\.async\.bulk\.tensor|cp\.async\.c\S+ .*?, 0x10\b|ld\.global\S*\.v4\.[bfsu]32|ld\.global\S*\.v2\.[bfsu]64"
)


def resources(kernel: object) -> dict[str, int]:
    """Registers and stack bytes of a thread, shared bytes of a block, and instruction counts of a compiled kernel."""
    if isinstance(kernel, Exception):
        return {"error": str(kernel)}
    common = {
        "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        "products": kernel.asm["ttir"].count("tt.dot "),
        "narrow_offsets": len(narrow_offsets(kernel.asm["ttir"])),
    }
    return common | (_amd_resources(kernel) if "amdgcn" in kernel.asm else _nvidia_resources(kernel))


def _nvidia_resources(kernel: object) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))
    ptx = kernel.asm["ptx"]
    return {
        "registers": registers,
        "stack": stack,
        "wgmma": ptx.count("wgmma.mma_async"),
        "mma": len(re.findall(r"\bmma\.sync", ptx)),
        "cp_async": ptx.count("cp.async.c"),
        "loads_16": len(re.findall(_LOAD_16, ptx)),
    }


def _amd_resources(kernel: object) -> dict[str, int]:
    """Scalar registers may be spilled to lanes of vector registers; what goes to memory is the stack."""
    assembly = kernel.asm["amdgcn"]
    notes = ("vgpr_count", "agpr_count", "vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
    vgpr, agpr, vgpr_spills, sgpr_spills, stack = (int(re.search(rf"\.{k}:\s+(\d+)", assembly)[1]) for k in notes)
    return {
        "vgpr": vgpr,  # accumulation registers included
        "agpr": agpr,
        "vgpr_spills": vgpr_spills,
        "sgpr_spills": sgpr_spills,
        "stack": stack,
        "mfma": len(re.findall(r"\bv_mfma", assembly)),
        "loads_16": len(re.findall(r"\b(?:global|buffer)_load_dwordx4", assembly)),
    }


def faults(name: str, arch: str, figures: dict[str, int], of: str = "") -> list[str]:
    """What a shipped configuration may not do, compiled by Triton `of`."""
    if "error" in figures:
        return [figures["error"]]
    found = []
    if figures["shared"] > SHARED_LIMIT[arch]:
        found.append(f"{figures['shared']} bytes of shared memory, {SHARED_LIMIT[arch]} usable")
    if figures["stack"] > SPILLS.get((of, arch, name.split()[0]), 0):
        found.append(f"{figures['stack']} bytes of stack: registers are spilled")
    if figures["narrow_offsets"]:
        found.append(f"{figures['narrow_offsets']} offsets are products of 32 bits")
    half = name.split()[1] in ("float16", "bfloat16")
    if figures["products"] and not figures["loads_16"]:
        found.append("no load of 16 bytes")
    if figures["products"] and half:
        if arch == "90" and (figures["wgmma"] == 0 or figures["mma"] > 0):
            found.append(f"{figures['wgmma']} wgmma and {figures['mma']} mma instructions")
        if arch == "80" and figures["mma"] == 0:
            found.append("no mma instruction")
        if arch == "gfx942" and figures["mfma"] == 0:
            found.append("no mfma instruction")
    return found
