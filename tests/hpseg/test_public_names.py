"""The names of `import hpseg`."""

from __future__ import annotations

import pytest


def test_public_names_are_there():
    import hpseg

    for name in hpseg.__all__:
        assert getattr(hpseg, name) is not None
    for name in ("train", "load", "evaluate", "predict_files", "show", "export", "import_hp", "overlay"):
        assert callable(getattr(hpseg, name)), name  # not the module of that name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        hpseg.nothing  # noqa: B018
