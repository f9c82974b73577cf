"""What tests of the CPU kernels share."""

import pytest

from hpkernels import _cpu


@pytest.fixture(params=_cpu.isas())
def isa(request):
    """Every instruction set that this machine has, with fresh memory full of NaN."""
    before = _cpu.isa()
    _cpu.set_isa(request.param)
    _cpu.poison_memory(True)
    yield request.param
    _cpu.poison_memory(False)
    _cpu.set_isa(before)
