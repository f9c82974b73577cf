"""The backends of a GPU."""

from __future__ import annotations

import pytest
import torch

from hpkernels import dispatch


@pytest.fixture(params=["triton", "cuda"])
def on(request, monkeypatch: pytest.MonkeyPatch) -> str:
    """A GPU backend, also for what has no `backend` argument."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    reason = dispatch.why_not(request.param, torch.device("cuda"))
    if reason:
        pytest.skip(f"{request.param}: {reason}")
    monkeypatch.setenv("HPKERNELS_BACKEND", request.param)
    return request.param
