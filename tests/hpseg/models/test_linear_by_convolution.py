"""Linear layers of frozen networks by convolution: the same products, where and only where they are meant to be."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from hpseg.models.backbone import load_backbone
from hpseg.models.products import FEWEST_ROWS, LinearByConvolution

BOTH = pytest.mark.skipif(
    not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()),
    reason="this torch has not both MKL and oneDNN, and takes linear layers from the only one",
)


class Calls(TorchFunctionMode):
    """Names of the functions called inside."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.names.append(getattr(function, "__name__", str(function)))
        return function(*args, **(kwargs or {}))


def taken(function, *args):
    """What `function` gives inside, and which of the two products it was made by."""
    with Calls() as calls, LinearByConvolution():
        found = function(*args)
    return found, {name for name in calls.names if name in ("linear", "conv2d")}


@BOTH
@pytest.mark.parametrize("shape", [(FEWEST_ROWS,), (2, 131), (2, 3, 5, 7)])
@pytest.mark.parametrize("channels", [(192, 576), (1, 5), (7, 1)])
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_linear_layer(shape, channels, bias):
    x = torch.randn(*shape, channels[0], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    layer = nn.Linear(*channels, bias=bias).requires_grad_(False)
    found, by = taken(layer, x.float())
    wanted = F.linear(x.float().double(), layer.weight.double(), None if bias is False else layer.bias.double())
    assert by == {"conv2d"} and found.shape == wanted.shape
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


@BOTH
def test_rows_that_do_not_lie_one_after_another():
    x = torch.randn(96, 2, 40).transpose(0, 1)[:, ::3]
    weight = torch.randn(24, 80)[:, ::2]
    found, by = taken(F.linear, x.repeat(1, 4, 1)[:, ::2], weight)
    assert by == {"conv2d"}
    torch.testing.assert_close(found, x.repeat(1, 4, 1)[:, ::2] @ weight.T)


def test_what_it_is_not_meant_for_stays_as_it_is():
    x, frozen, trained = torch.randn(128, 16), nn.Linear(16, 8).requires_grad_(False), nn.Linear(16, 8)
    assert taken(frozen, x[: FEWEST_ROWS - 1])[1] == {"linear"}
    assert taken(trained, x)[1] == {"linear"}
    assert taken(frozen, x.clone().requires_grad_())[1] == {"linear"}
    assert taken(nn.Linear(16, 8).double().requires_grad_(False), x.double())[1] == {"linear"}
    assert taken(frozen, x.new_zeros(0, 16))[0].shape == (0, 8)
    with torch.autocast("cpu", torch.bfloat16):
        found, by = taken(frozen, x)
    assert by == {"linear"} and found.dtype == torch.bfloat16
    with torch.backends.mkldnn.flags(enabled=False):
        assert taken(frozen, x)[1] == {"linear"}


def test_a_program_that_is_exported_has_linear_layers():
    """An exported program is for any device, and any number of rows."""

    class Inside(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(16, 8).requires_grad_(False)

        def forward(self, x):
            with LinearByConvolution():
                return self.layer(x)

    rows = {"x": {0: torch.export.Dim("rows", min=2)}}
    program = torch.export.export(Inside(), (torch.randn(128, 16),), dynamic_shapes=rows, strict=False)
    assert program.module()(torch.randn(3, 16)).shape == (3, 8)
    called = {str(node.target) for node in program.graph.nodes}
    assert "aten.linear.default" in called and not any("conv" in name for name in called)


@BOTH
def test_a_backbone_reads_by_it_and_says_the_same():
    backbone = load_backbone("embedded-selfsup")
    images = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    with Calls() as calls, torch.no_grad():
        tokens = backbone(images, with_neighbors=True)
    assert "linear" not in calls.names
    with Calls() as calls, torch.no_grad(), torch.backends.mkldnn.flags(enabled=False):
        plain = backbone(images, with_neighbors=True)
    assert "linear" in calls.names
    torch.testing.assert_close(tokens.features, plain.features, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(tokens.neighbors, plain.neighbors, rtol=1e-4, atol=1e-5)
