"""Every op on every backend passes torch's own op checks, and the public faces compile, autocast and convert."""

from __future__ import annotations

import torch

import hpkernels as hk
from hpkernels.common import checks as _checks
from hpkernels.ops.cluster_assign import op as cluster_assign
from hpkernels.ops.contrastive import op as contrastive
from hpkernels.ops.group_lse import op as group_op
from hpkernels.ops.label_positives import op as label_positives
from hpkernels.ops.local_mix import op as local_mix
from hpkernels.ops.normalize import op as normalize
from hpkernels.ops.pair_bits import op as pair_bits
from hpkernels.ops.similarity_search import op as search


def op_calls(backend: str, device) -> list[tuple]:
    """(name, op, arguments) with small inputs; tensors that are differentiated require a gradient."""
    n, d = 40, 12
    x = torch.nn.functional.normalize(torch.randn(2, n, d, device=device), dim=2)
    rows = x[0]
    P = hk.PairMask.from_dense(torch.rand(n, n, device=device) < 0.2).off_diagonal()
    Q = hk.PairMask.from_labels(torch.arange(n, device=device) % 7)
    M = hk.PairMask.random(0.2, (10, n), 1, device=device)
    table = torch.randn(2, n, device=device)
    groups = torch.arange(n, device=device) % 3
    attention = torch.randn(2, 3, 20, 20, device=device)
    queries, keys, _ = torch.randn(2, 22, 3, 3, 8, device=device).permute(2, 0, 3, 1, 4)[:, :, :, 2:]
    weights, code = torch.rand(2, 20, 9, device=device), torch.randn(2, 20, 6, device=device)
    masks = (P.bits, P.T.bits, Q.bits, None, M.bits)
    range_masks = (P.bits[7:26], P.T.bits[7:26], Q.bits[7:26], None, M.bits)
    seed = torch.tensor(3, device=device)
    grad = x.clone().requires_grad_()
    own, bank = rows.clone().requires_grad_(), x[1, :17].clone().requires_grad_()
    by_label = (groups, 2 * groups + groups % 2, bank, groups[:17], 2 * groups[:17])
    counts = torch.full((n,), 5, device=device)
    members = torch.randint(-1, n, (n, 3), device=device)
    stats_rows, grad_rows = contrastive.contrastive_stats_rows, contrastive.contrastive_grad_rows
    mixed = (code.clone(), code.clone(), weights.clone(), 4, 5, True, False, backend)
    softplus = (own, counts, *by_label, table[0].clone().requires_grad_(), 0.3)
    return [
        ("max_similarity", search.max_similarity, (rows, rows[:5], backend)),
        ("topk_similarity", search.topk_similarity, (rows, rows, 4, True, None, None, backend)),
        ("topk_groups", search.topk_similarity, (rows, rows, 4, False, groups, groups, backend)),
        ("pairs_above", search.pairs_above, (rows, table[0], None, None, backend)),
        ("pairs_above_keys", search.pairs_above, (rows, table[0], rows[:9], table[1, :9], backend)),
        ("stats_all", stats_rows, (grad, P.bits, P.T.bits, Q.bits, None, None, "all", 0, 0.8, backend)),
        ("stats_dense", stats_rows, (grad, *masks, "dense", 0, 0.8, backend)),
        ("stats_sparse", stats_rows, (grad, *masks, "sparse", 0, 0.8, backend)),
        ("stats_plain", stats_rows, (grad, Q.bits, None, None, None, None, "sparse", 0, 0.8, backend)),
        ("stats_range", stats_rows, (x, *range_masks, "dense", 7, 0.8, backend)),
        ("grad", grad_rows, (x, *masks, "dense", 0, 0.8, table, table, table, table, backend)),
        ("grad_range", grad_rows, (x, *range_masks, "sparse", 7, 0.8, table, table, table, table, backend)),
        ("group_lse", group_op._group_lse, (own, groups, None, None, 0.3, backend)),
        ("group_lse_keys", group_op._group_lse, (own, groups, bank, groups[:17], 0.3, backend)),
        ("group_lse_grad", group_op._group_lse_grad, (rows, groups, None, None, 0.3, *table, False, backend)),
        ("neighbor_weights", local_mix.neighbor_weights, (attention, 4, 5, 28.0, 0.1, 0.9, backend)),
        ("neighbor_weights_qk", local_mix.neighbor_weights_qk, (queries, keys, 0.3, 4, 5, 28.0, 0.1, 0.9, backend)),
        ("neighbor_mix", local_mix._neighbor_mix, (code.requires_grad_(), weights.requires_grad_(), 4, 5, backend)),
        ("neighbor_mix_code", local_mix._neighbor_mix, (code, weights.detach(), 4, 5, backend)),
        ("neighbor_mix_grad", local_mix._neighbor_mix_grad, mixed),
        ("random_bits", pair_bits.random_bits, (seed, 10, 150, 0.3, backend)),
        ("count_bits", pair_bits.count_bits, ([P.bits], backend)),
        ("transpose_bits", pair_bits.transpose_bits, (M.bits, n, backend)),
        ("pairs_from_indices", pair_bits.pairs_from_indices, (members, n, True, 5, 20, backend)),
        ("pack_bits", pair_bits.pack_bits, (rows > 0,)),
        ("pairs_of_labels", pair_bits.pairs_of_labels, (groups, groups > 0)),
        ("cluster_assign", cluster_assign.cluster_assign, (rows, rows[:7], rows[:7], table[0, :7], backend)),
        ("normalize_rows", normalize._normalize_rows, (rows.clone().requires_grad_(), "x", backend)),
        ("normalize_rows_grad", normalize._normalize_rows_grad, (rows, rows, backend)),
        ("check_finite", _checks.check_finite_op, (rows, "x", 1e9)),
        ("check_padding", pair_bits.check_padding, (P.bits, n)),
        ("logit_mean", label_positives._logit_mean, (own, counts, groups, None, None, None, None, 0.3)),
        ("logit_mean_keys", label_positives._logit_mean, (own, counts, *by_label, 0.3)),
        ("softplus_mean", label_positives._softplus_mean, softplus),
    ]  # fmt: skip


def test_opcheck(backend, device):
    for name, op, arguments in op_calls(backend, device):
        try:
            torch.library.opcheck(op, arguments)
        except Exception as error:
            raise AssertionError(f"opcheck of {name} on {backend}") from error


def loss_inputs(device, dtype=torch.float32):
    p = {k: torch.randn(48, 12, device=device, dtype=dtype) for k in ("z", "z_local", "features", "head")}
    return p | {"pool": torch.randn(9, 12, device=device, dtype=dtype)}


def test_compile_fullgraph_without_recompiling(backend, device):
    """One graph; lambda changes every step, as a 0-dim tensor and as a float, without one more compilation."""
    p = loss_inputs(device)

    def step(z, z_local, weight):
        return hk.hidden_positive_loss(
            z, p["features"], p["pool"], z_local=z_local, head_features=p["head"], head_pool=p["pool"],
            head_weight=weight, tokens_per_image=12, negative_rate=0.1, seed=1, backend=backend,
        )  # fmt: skip

    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(step, fullgraph=True, backend=count)
    for weight in (0.0, 0.1, 0.2, 0.7, 1.0):
        as_tensor = torch.tensor(weight, device=device)
        torch.testing.assert_close(compiled(p["z"], p["z_local"], as_tensor), step(p["z"], p["z_local"], as_tensor))
    assert len(graphs) == 1
    for weight in (0.15, 0.25, 0.7, 0.9):
        torch.testing.assert_close(compiled(p["z"], p["z_local"], weight), step(p["z"], p["z_local"], weight))
    assert len(graphs) <= 3  # one for the first float, one when it is found to vary


def test_compile_with_gradients(device):
    p = loss_inputs(device)

    def step(z, attention):
        mixed = hk.local_mix(z.view(3, 16, 12), attention, (4, 4))
        return hk.hidden_positive_loss(z.view(3, 16, 12), p["features"], positives_per_anchor=4, z_local=mixed, seed=1)

    torch._dynamo.reset()
    for attention in (torch.randn(3, 2, 16, 16, device=device), tuple(torch.randn(2, 3, 2, 16, 8, device=device))):
        grads = []
        for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
            z = p["z"].clone().requires_grad_()
            run(z, attention).backward()
            grads.append(z.grad)
        torch.testing.assert_close(grads[1], grads[0])


def test_compile_dynamic_rows(device):
    """One more graph at most when the number of patches changes."""
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda z, f, pool: hk.hidden_positive_loss(z, f, pool, seed=1), fullgraph=True, backend="eager", dynamic=True
    )
    p = loss_inputs(device)
    for n in (48, 40, 33):
        expected = hk.hidden_positive_loss(p["z"][:n], p["features"][:n], p["pool"], seed=1)
        torch.testing.assert_close(compiled(p["z"][:n], p["features"][:n], p["pool"]), expected)


def test_autocast_changes_nothing(backend, device):
    p = loss_inputs(device)
    plain = hk.hidden_positive_loss(p["z"], p["features"], p["pool"], seed=1, backend=backend)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        inside = hk.hidden_positive_loss(p["z"], p["features"], p["pool"], seed=1, backend=backend)
    assert inside.dtype == torch.float32 and torch.equal(plain, inside)


def test_cuda_graph_capture(cuda):
    p = loss_inputs(cuda)
    z = p["z"].clone().requires_grad_()

    def step():
        z.grad = None
        hk.hidden_positive_loss(z, p["features"], p["pool"], tokens_per_image=12, seed=seed).backward()

    seed = torch.tensor(1, device=cuda)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    graph.replay()
    captured = z.grad.clone()
    step()
    assert torch.equal(captured, z.grad)


def test_strided_and_expanded_inputs(backend, device):
    p = loss_inputs(device)
    wide = torch.randn(48, 24, device=device)
    z = wide[:, ::2]
    expected = hk.hidden_positive_loss(z.contiguous(), p["features"], p["pool"], seed=1, backend=backend)
    assert torch.equal(
        hk.hidden_positive_loss(z, p["features"].T.contiguous().T, p["pool"], seed=1, backend=backend), expected
    )
    same = torch.randn(1, 12, device=device).expand(48, 12)
    loss = hk.hidden_positive_loss(same, p["features"], p["pool"], seed=1, backend=backend)
    assert torch.isfinite(loss)


def test_search_takes_every_dtype(backend, device):
    queries, keys = torch.randn(30, 8, device=device), torch.randn(20, 8, device=device)
    for a in (torch.float16, torch.bfloat16, torch.float32):
        for b in (torch.float16, torch.bfloat16, torch.float32):
            exact = queries.to(a).double() @ keys.to(b).double().T
            values = hk.max_similarity(queries.to(a), keys.to(b), backend=backend)
            torch.testing.assert_close(values.double(), exact.amax(1), rtol=1e-6, atol=1e-6)
            values, indices = hk.topk_similarity(queries.to(a), keys.to(b), 3, backend=backend)
            torch.testing.assert_close(values.double(), exact.topk(3).values, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(exact.gather(1, indices), exact.topk(3).values, rtol=1e-6, atol=1e-6)
