"""Large arrays that take little memory: address space in which few pages, or always the same ones, are real.

Before an array lie 2^31 elements more, which an index that wrapped around meets: zeros before a sparse array, so that
the result is wrong; before a repeated one memory that nothing may touch, which ends the process, as passes over all
elements would fill those zeros. Tests that use repeated arrays run in a process of their own.
"""

from __future__ import annotations

import ctypes
import os

import torch
from torch import Tensor

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype, _libc.munmap.restype = ctypes.c_void_p, ctypes.c_int
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + 3 * [ctypes.c_int] + [ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_NONE, _READ_WRITE = 0, 3  # PROT_*
_SHARED, _PRIVATE, _FIXED, _ANONYMOUS, _NO_RESERVE = 1, 2, 0x10, 0x20, 0x4000  # MAP_*
_PAGE = 4096
_REACH = 1 << 31  # elements


def _map(address: int, size: int, protection: int, flags: int, file: int = -1) -> int:
    found = _libc.mmap(address, size, protection, flags, file, 0)
    if found in (None, ctypes.c_void_p(-1).value):
        raise OSError(ctypes.get_errno(), f"mmap of {size} bytes")
    return found


class _Mapped:
    def __init__(self, count: int, dtype: torch.dtype, protection: int) -> None:
        self.count, self.dtype = count, dtype
        self.size = -(-count * dtype.itemsize // _PAGE) * _PAGE
        before = _REACH * dtype.itemsize
        self._base = _map(0, before + self.size, protection, _PRIVATE | _ANONYMOUS | _NO_RESERVE)
        self.address = self._base + before

    def close(self) -> None:
        _libc.munmap(self._base, self.address - self._base + self.size)

    def at(self, element: int, count: int) -> Tensor:
        """That many elements from one on, as a tensor over the memory itself."""
        assert 0 <= element and element + count <= self.count
        array = (ctypes.c_char * (count * self.dtype.itemsize)).from_address(
            self.address + element * self.dtype.itemsize
        )
        return torch.frombuffer(array, dtype=self.dtype)


class Sparse(_Mapped):
    """`count` elements, zero until written; pages become real when written."""

    def __init__(self, count: int, dtype: torch.dtype) -> None:
        super().__init__(count, dtype, _READ_WRITE)


class Repeated(_Mapped):
    """`count` elements in which `period`, whole pages, come again and again: the same memory each time."""

    def __init__(self, period: Tensor, count: int) -> None:
        super().__init__(count, period.dtype, _NONE)
        width = period.numel() * period.element_size()
        assert width % _PAGE == 0 and self.size // width < 60_000  # maps that Linux allows a process
        file = os.memfd_create("period")
        os.ftruncate(file, width)
        for start in range(0, self.size, width):
            _map(self.address + start, min(width, self.size - start), _READ_WRITE, _SHARED | _FIXED, file)
        os.close(file)
        self.at(0, period.numel()).copy_(period.flatten())

    def own(self, element: int, count: int) -> None:
        """Pages of their own, zero, for these elements."""
        start, size = element * self.dtype.itemsize, count * self.dtype.itemsize
        assert start % _PAGE == 0 and size % _PAGE == 0
        _map(self.address + start, size, _READ_WRITE, _PRIVATE | _ANONYMOUS | _NO_RESERVE | _FIXED)
