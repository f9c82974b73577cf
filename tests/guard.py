"""Operands that end at memory nobody may touch."""

from __future__ import annotations

import ctypes
import mmap

import torch


def before_guard_page(x: torch.Tensor | None) -> torch.Tensor | None:
    """A copy that ends where a page begins that nobody may touch: reading past it ends the process."""
    if x is None:
        return None
    size = x.numel() * x.element_size()
    pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    no_access = 0
    assert ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(address + pages), mmap.PAGESIZE, no_access) == 0
    return torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=pages - size).view(x.shape).copy_(x)
