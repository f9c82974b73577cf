"""hidden_positive_loss over a process group (gloo, CPU) equals the one-process loss on the concatenated batch.

Each world is spawned once and runs all cases; the tests then look at what its ranks saved.
"""

from __future__ import annotations

import datetime
import gc
import os
import pathlib
import weakref

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import hpkernels as hk
from hpkernels import mining

TOKENS = 6
WORLDS = {"two": [3, 5], "three": [4, 4, 4]}  # images of each rank
TIMEOUT = 120  # seconds; a hang fails instead of waiting for ever

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")

CASES = {
    "pool": {},
    "nearest": {"k": 4},
    "all_pairs": {"negative_rate": 1.0},
    "positives_only": {"negative_rate": 0.0, "k": 7},
    "dense": {"negative_rate": 0.5},
    "two_streams_and_head": {"z_local": True, "head": True},
    "nearest_head": {"z_local": True, "head": True, "k": 3, "weighting": "separate"},
    "head_without_weight": {"head": True, "head_weight": 0.0},
    "anchors": {"head": True, "weighting": "anchors"},
    "separate": {"head": True, "weighting": "separate", "negative_rate": 0.5},
    "head_in_denominator": {"z_local": True, "head": True, "head_in_denominator": True},
    "mask": {"mask": "tokens"},
    "square_mask": {"mask": "square"},
    "cold": {"temperature": 0.01, "head": True, "k": 5},
    "shared_pool": {"shared_pool": True},
    "flat_rows": {"flat": True, "k": 2},
    "reference": {"backend": "reference", "head": True},
    "single": {"dtype": torch.float32, "z_local": True, "head": True},
    "single_nearest": {"dtype": torch.float32, "k": 4, "negative_rate": 0.5},
    "empty_rank": {"empty": True, "z_local": True, "head": True},
    "empty_rank_nearest": {"empty": True, "k": 4, "negative_rate": 0.5},
    "panels": {"bits_bytes": 1, "images": 40, "z_local": True, "head": True},  # 128 anchors at a time
    "panels_nearest": {"bits_bytes": 1, "images": 40, "k": 3, "negative_rate": 0.5},
}


def inputs(images: list[int], dtype=torch.float64) -> list[dict[str, torch.Tensor]]:
    """The parts of every rank, the same in every process; rank r's pools have 2 + r rows."""
    generator = torch.Generator().manual_seed(5)
    centres = {name: torch.randn(4, width, generator=generator) for name, width in (("features", 9), ("head", 7))}

    def draw(name: str, *shape: int) -> torch.Tensor:
        x = torch.randn(*shape, generator=generator)
        if name in centres:
            x = 0.7 * x + centres[name][torch.randint(4, shape[:2], generator=generator)]
        return x.to(dtype)

    parts = []
    for rank, count in enumerate(images):
        part = {"z": draw("z", count, TOKENS, 12), "z_local": draw("z_local", count, TOKENS, 12)}
        part |= {name: draw(name, count, TOKENS, centres[name].shape[1]) for name in centres}
        part |= {"pool": draw("pool", 2 + rank, 9) * 0.5, "head_pool": draw("pool", 2 + rank, 7) * 0.5}
        parts.append(part)
    return parts


def whole(parts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def run(part, total_images, group=None, *, k=None, z_local=False, head=False, mask=None, flat=False, shared_pool=False,
        head_weight=0.4, dtype=None, images=None, empty=False, bits_bytes=None, **options):  # fmt: skip
    """(loss, stats, gradients) of one process's part of a case."""
    leaves = {name: part[name].clone().requires_grad_() for name in ("z", "z_local")[: 2 if z_local else 1]}
    arguments = dict(leaves, features=part["features"], seed=3, process_group=group, return_stats=True, **options)
    if k is None:
        arguments |= {"pool": part["pool"]} | ({"head_pool": part["head_pool"]} if head else {})
    else:
        arguments |= {"positives_per_anchor": k}
    if head:
        arguments |= {"head_features": part["head"], "head_weight": head_weight}
    if mask:
        rows = TOKENS if mask == "tokens" else total_images * TOKENS
        generator = torch.Generator().manual_seed(8)
        arguments |= {"negative_mask": torch.rand(rows, total_images * TOKENS, generator=generator) < 0.1}
    if flat:
        arguments["z"] = leaves["z"].flatten(0, 1)
        arguments["tokens_per_image"] = TOKENS
    loss, stats = hk.hidden_positive_loss(**arguments)
    loss.backward()
    return {"loss": loss.detach(), "stats": torch.stack(stats), **{name: x.grad for name, x in leaves.items()}}


def images_of(case: dict, world: list[int]) -> list[int]:
    """The world's images; with "empty" none on the last rank but one, with "images" more on that and the last."""
    images = list(world)
    images[-2] = 0 if case.get("empty") else images[-2] + case.get("images", 0)
    images[-1] += case.get("images", 0)
    return images


def run_case(case: dict, world: list[int], rank: int | None = None, group=None):
    images = images_of(case, world)
    parts = inputs(images, case.get("dtype", torch.float64))
    everything = whole(parts)
    part = everything if rank is None else parts[rank]
    if case.get("shared_pool") and rank is not None:
        part = part | {"pool": everything["pool"]}
    if "bits_bytes" in case and rank is not None:
        os.environ["HPKERNELS_BITS_BYTES"] = str(case["bits_bytes"])
    try:
        return run(part, sum(images), group, **case)
    finally:
        os.environ.pop("HPKERNELS_BITS_BYTES", None)


# What the last rank passes differently, and what every rank must then say.
SAME, FAULT = "expected the same on every rank of process_group, got", "rank [12] of process_group: "
ERRORS = {
    "tokens": (lambda p: {"z": p["z"].reshape(-1, 3, 12)}, ValueError, f"tokens_per_image: {SAME} 6 on rank 0 and 3"),
    "width": (lambda p: {"z": p["z"][..., :10]}, ValueError, f"z: {SAME} vectors of length 12"),
    "no_pool": (lambda p: {"pool": None, "positives_per_anchor": 2}, ValueError, f"positives_per_anchor: {SAME} None"),
    "dtype": (lambda p: {"z": p["z"].float()}, ValueError, f"z: {SAME}"),
    "local": (lambda p: {"z_local": p["z"]}, ValueError, f"z_local: {SAME} None on rank 0"),
    "own_fault": (lambda p: {"temperature": -1.0}, ValueError, f"{FAULT}temperature: expected a finite"),
    "own_type": (lambda p: {"features": 3}, TypeError, f"{FAULT}features: expected a torch.Tensor"),
    "non_finite": (lambda p: {"z": p["z"] * torch.nan}, ValueError, f"{FAULT}z: expected finite"),
    "no_tokens": (lambda p: {"z": p["z"].flatten(0, 1)}, ValueError, f"{FAULT}tokens_per_image: expected"),
    "temperature": (lambda p: {"temperature": 0.5}, ValueError, f"temperature: {SAME} 0.8 on rank 0 and 0.5"),
    "no_search": (
        lambda p: {"head_features": p["features"], "head_pool": p["pool"]},
        ValueError,
        f"head_features: {SAME} None",
    ),
    "detached": (lambda p: {"z": p["z"].detach()}, ValueError, f"requires_grad: {SAME} True"),
}


def run_error(change, world: list[int], rank: int, group) -> tuple[str, str] | None:
    part = inputs(world)[rank]
    arguments = {"z": part["z"].requires_grad_(), "features": part["features"], "pool": part["pool"]}
    if rank == len(world) - 1:
        arguments |= change(arguments)
    try:
        hk.hidden_positive_loss(**arguments, process_group=group)
    except (TypeError, ValueError) as error:
        return type(error).__name__, str(error)
    return None


def run_drawn_seed(world: list[int], rank: int, group) -> torch.Tensor:
    """The loss without a seed: every rank must use rank 0's, though their generators differ."""
    torch.manual_seed(rank)
    part = inputs(world)[rank]
    return hk.hidden_positive_loss(part["z"], part["features"], part["pool"], negative_rate=0.3, process_group=group)


def run_bits(world: list[int], rank: int, group) -> list[tuple[int, ...]]:
    """Shapes of the pair bits this rank ever makes."""
    shapes, rows_of = [], mining.PairsAbove.rows

    def recorded(self, first_row, rows):
        bits = rows_of(self, first_row, rows)
        shapes.append(tuple(bits.shape))
        return bits

    mining.PairsAbove.rows = recorded
    try:
        part = inputs(world)[rank]
        z = part["z"].requires_grad_()
        hk.hidden_positive_loss(z, part["features"], part["pool"], process_group=group).backward()
    finally:
        mining.PairsAbove.rows = rows_of
    return shapes


def head_module() -> torch.nn.Module:
    torch.manual_seed(1)
    return torch.nn.Linear(9, 12).double()


def run_data_parallel(world: list[int], rank: int, group) -> torch.Tensor:
    """A parameter's gradient under DistributedDataParallel, with the loss multiplied as the docstring says."""
    part = inputs(world)[rank]
    model = torch.nn.parallel.DistributedDataParallel(head_module(), process_group=group)
    z = model(part["features"])
    loss = hk.hidden_positive_loss(z, part["features"], positives_per_anchor=3, seed=3, process_group=group)
    (loss * dist.get_world_size(group)).backward()
    return model.module.weight.grad


def worker(rank: int, world: list[int], folder: str) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=len(world),
        timeout=datetime.timedelta(seconds=TIMEOUT),
    )  # fmt: skip
    group = dist.group.WORLD
    results = {name: run_case(case, world, rank, group) for name, case in CASES.items()}
    results["errors"] = {name: run_error(change, world, rank, group) for name, (change, *_) in ERRORS.items()}
    results["drawn_seed"] = run_drawn_seed(world, rank, group)
    results["bits"] = run_bits(world, rank, group)
    results["data_parallel"] = run_data_parallel(world, rank, group)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    watched = weakref.ref(group)
    del group, results  # whose losses have graphs that hold the group
    gc.collect()
    dist.destroy_process_group()
    # Threads of a group that outlives its destruction abort the process now and then.
    assert watched() is None, [type(holder) for holder in gc.get_referrers(watched())]


@pytest.fixture(scope="module", params=WORLDS)
def ranks(request, tmp_path_factory):
    """(images of each rank, what each rank saved)."""
    world = WORLDS[request.param]
    folder: pathlib.Path = tmp_path_factory.mktemp(request.param)
    context = mp.spawn(worker, args=(world, str(folder)), nprocs=len(world), join=False)
    deadline = datetime.datetime.now() + datetime.timedelta(seconds=TIMEOUT)
    while not context.join(timeout=1):
        if datetime.datetime.now() > deadline:
            for process in context.processes:
                process.kill()
            pytest.fail(f"the ranks did not finish within {TIMEOUT} s")
    return world, [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(len(world))]


@pytest.mark.parametrize("name", CASES)
def test_equals_one_process(ranks, name):
    """fp64 to 1e-10 and fp32 to 1e-5 of the largest number: sums over rows are made in another order."""
    world, saved = ranks
    expected = run_case(CASES[name], world)
    rel = 1e-5 if CASES[name].get("dtype") == torch.float32 else 1e-10
    for own in saved:
        for key in ("loss", "stats"):
            assert torch.equal(own[name][key], saved[0][name][key])  # the same bits on every rank
            torch.testing.assert_close(own[name][key], expected[key], rtol=rel, atol=0)
    for key in expected.keys() - {"loss", "stats"}:
        grad = torch.cat([own[name][key] for own in saved])
        assert (grad - expected[key]).abs().max() <= rel * expected[key].abs().max()
        assert expected[key].any()


@pytest.mark.parametrize("name", ERRORS)
def test_errors_reach_every_rank(ranks, name):
    _, error, message = ERRORS[name]
    _, saved = ranks
    first = saved[0]["errors"][name]
    assert first is not None and first[0] == error.__name__
    with pytest.raises(error, match=message):
        raise error(first[1])
    assert all(own["errors"][name] == first for own in saved)


def test_seed_of_the_first_rank_serves_all(ranks):
    world, saved = ranks
    torch.manual_seed(0)
    everything = whole(inputs(world))
    expected = hk.hidden_positive_loss(everything["z"], everything["features"], everything["pool"], negative_rate=0.3)
    for own in saved:
        torch.testing.assert_close(own["drawn_seed"], expected, rtol=1e-10, atol=0)


def test_bits_of_a_rank_are_its_own_rows(ranks):
    world, saved = ranks
    words = hk.PairMask.random(0.0, (1, sum(world) * TOKENS), 0).bits.shape[1]
    for images, own in zip(world, saved):
        assert own["bits"] == [(images * TOKENS, words)]  # once: kept for the backward pass


def test_gradients_under_data_parallel(ranks):
    world, saved = ranks
    model, everything = head_module(), whole(inputs(world))
    z = model(everything["features"])
    hk.hidden_positive_loss(z, everything["features"], positives_per_anchor=3, seed=3).backward()
    for own in saved:
        torch.testing.assert_close(own["data_parallel"], model.weight.grad, rtol=1e-10, atol=1e-12)


def test_a_compiled_step_breaks_its_graph_at_the_exchanges(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        part = inputs([3])[0]

        def step(z):
            return hk.hidden_positive_loss(z, part["features"], part["pool"], seed=3, process_group=dist.group.WORLD)

        grads = []
        for call in (step, torch.compile(step, backend="aot_eager")):
            z = part["z"].clone().requires_grad_()
            call(z).backward()
            grads.append(z.grad)
        torch.testing.assert_close(grads[1], grads[0], rtol=1e-10, atol=0)
    finally:
        dist.destroy_process_group()
