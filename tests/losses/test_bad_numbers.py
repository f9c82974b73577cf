"""Where nobody may look at the inputs, on a GPU: a bad number shows in the few numbers of a row that one looks at."""

import pytest
import torch

import hpkernels.ops.normalize.op as normalize
import hpkernels.ops.similarity_search.op as search
from hpkernels.common.checks import poison, witness
from hpkernels.losses.statistics import unit_rows
from hpkernels.mining import Graph, find_rule

BAD = [torch.nan, torch.inf, -torch.inf]


@pytest.fixture(autouse=True)
def _unseen(monkeypatch):
    """As on a GPU: inputs are not looked at before."""
    monkeypatch.setattr(normalize, "look_finite", lambda name, x: None)
    monkeypatch.setattr(search, "_refuse_non_finite", lambda backend, *thresholds, **vectors: None)


def _inputs(where, bad, dtype=torch.float32):
    inputs = {"features": torch.randn(40, 9, dtype=dtype), "pool": torch.randn(7, 9, dtype=dtype)}
    if where is not None:
        inputs[where][3, 5] = bad
    return inputs


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("where", [None, "features", "pool"])
def test_of_features_and_pools(where, bad):
    features, pool = _inputs(where, bad).values()
    rule = find_rule(Graph("features", features, "pool", pool, None), "reference")
    assert rule.witness.numel() == 40 and poison(rule.witness).isnan() == (where is not None)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("where", [None, "features"])
def test_of_nearest_neighbours(where, bad):
    features = _inputs(where, bad)["features"]
    rule = find_rule(Graph("features", features, "pool", None, 3), "reference")
    assert rule.witness.numel() == 40 and poison(rule.witness).isnan() == (where is not None)
    assert rule.witness.untyped_storage().nbytes() == 40 * 4  # a view would keep the unit rows


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_of_streams(bad, dtype):
    good, spoiled = torch.randn(2, 5, 6).to(dtype)
    spoiled[4, 5] = bad
    x = unit_rows([good, spoiled], "reference")
    assert poison(*map(witness, x)).isnan() and poison(witness(x[0])) == 0


def test_of_different_dtypes_and_of_nothing():
    assert poison(torch.ones(3, dtype=torch.bfloat16), torch.ones(2, 1)) == 0
    assert poison(torch.ones(3, dtype=torch.float64), torch.full((1,), torch.nan)).isnan()
    assert poison(torch.ones(0), witness(torch.ones(4, 0))) == 0
