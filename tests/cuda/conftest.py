"""The kernels compiled for the host, as tests/ops has them."""

from tests.ops.cuda_on_host import library, shim  # noqa: F401  (fixtures)
