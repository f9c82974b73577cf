"""What a checkpoint holds, so that a run that goes on from it is the run that was never stopped."""

from __future__ import annotations

import logging
from typing import Any

from hpseg.run.errors import UsageError
from hpseg.run.folder import explaining_state
from hpseg.training.setup import Setup

logger = logging.getLogger(__name__)


def collect(setup: Setup, step: int) -> dict[str, Any]:
    """The state after `step` steps, as `restore` takes it."""
    method, source, selection = setup.method, setup.source, setup.selection
    return {
        "step": step,
        "fingerprint": setup.backbone.fingerprint,
        "pictures": setup.pictures,
        "method": method.state_dict(),
        "extra": method.extra_state(),
        "optimizers": {name: optimizer.state_dict() for name, optimizer in setup.optimizers.items()},
        "dropout_rng": source.dropout_rng.get_state(),
        "pool_rng": source.pool_rng.get_state(),
        "unreadable": sorted(setup.encoder.unreadable),
        **({"selection": selection.state()} if selection else {}),
    }


def restore(setup: Setup, state: dict[str, Any] | None) -> int:
    """Puts the run where `state` was collected, or without one at its beginning; returns the steps already made."""
    config, out, method, source = setup.config, setup.out, setup.method, setup.source
    if state is None:
        method.start(source)
        return 0
    with explaining_state(out / "state.pt"):
        step = state["step"]
        if state["fingerprint"] != setup.backbone.fingerprint:
            raise UsageError(
                f"backbone: {config.backbone!r} holds other weights than those {out} was started with; go on with the "
                "version of hpseg that started it, or start anew with overwrite"
            )
        if state.get("pictures", setup.pictures) != setup.pictures:
            raise UsageError(
                f"images: pictures were added to, removed from or renamed in {config.images} since {out} was "
                "started; resume with those that were there, or start anew with overwrite"
            )
        method.load_state_dict(state["method"])
        for name, optimizer in setup.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        method.load_extra_state(state["extra"])
        source.dropout_rng.set_state(state["dropout_rng"])
        source.pool_rng.set_state(state["pool_rng"])
        setup.encoder.unreadable.update(state["unreadable"])
        if setup.selection:
            setup.selection.load_state(state["selection"])
    logger.info(f"going on from step {step} of {config.steps}")
    return step
