"""The reading of TTIR that aot.py holds every kernel to: products in 32 bits are found, products in 64 bits are not."""

from __future__ import annotations

import pytest
from offsets import narrow_offsets

KERNEL = """
tt.func public @k(%x_ptr: !tt.ptr<f32> loc("x"(#loc)), %heads: i32, %stride: i32, %R: i32) attributes {{}} {{
  %c0 = arith.constant 0 : i32
  %c1 = arith.constant 1 : i32
  %c32 = arith.constant 32 : i32
  %p = tt.get_program_id x : i32
{body}
  tt.return
}}
"""
WIDE = """
  %a = arith.extsi %p : i32 to i64
  %b = arith.extsi %stride : i32 to i64
  %c = arith.muli %a, %b : i64
  %x = tt.addptr %x_ptr, %c : !tt.ptr<f32>, i64
"""
NARROW = """
  %a = arith.muli %p, %stride : i32
  %x = tt.addptr %x_ptr, %a : !tt.ptr<f32>, i32
"""
LATE = """
  %a = arith.muli %p, %stride : i32
  %b = arith.extsi %a : i32 to i64
  %x = tt.addptr %x_ptr, %b : !tt.ptr<f32>, i64
"""
LOOP = """
  %r = scf.for %head = %c0 to %heads step %c1 iter_args(%sum = %c0) -> (i32) : i32 {
    %a = arith.muli %head, %stride : i32
    %b = arith.addi %sum, %a : i32
    scf.yield %b : i32
  }
  %x = tt.addptr %x_ptr, %r : !tt.ptr<f32>, i32
"""
CLAMPED = """
  %a = arith.muli %p, %stride : i32
  %b = arith.minsi %a, %heads : i32
  %x = tt.addptr %x_ptr, %b : !tt.ptr<f32>, i32
"""
INDEX = """
  %a = arith.muli %p, %c32 : i32
  %b = arith.remsi %a, %R : i32
  %x = tt.addptr %x_ptr, %b : !tt.ptr<f32>, i32
"""
ROW_OF_MASK = """
  %b = arith.remsi %p, %R : i32
  %c = arith.muli %b, %stride : i32
  %x = tt.addptr %x_ptr, %c : !tt.ptr<f32>, i32
"""


@pytest.mark.parametrize(
    "body, count", [(WIDE, 0), (NARROW, 1), (LATE, 1), (LOOP, 1), (CLAMPED, 0), (INDEX, 0), (ROW_OF_MASK, 1)]
)
def test_products_of_32_bits(body: str, count: int):
    assert len(narrow_offsets(KERNEL.format(body=body))) == count
