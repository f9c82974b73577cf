"""The hidden-positive loss written straight from its definition in fp64 numpy: independent of the package's code."""

from __future__ import annotations

import numpy as np


def unit(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, np.float64)
    norm = np.linalg.norm(x, axis=1, keepdims=True)
    return np.divide(x, norm, out=np.zeros_like(x), where=norm > 0)


def positives(features: np.ndarray, pool: np.ndarray) -> np.ndarray:
    f, a = unit(features), unit(pool)
    r = (f @ a.T).max(1)
    chosen = f @ f.T > np.minimum(r[:, None], r[None])
    np.fill_diagonal(chosen, False)
    return chosen


def nearest(features: np.ndarray, k: int) -> np.ndarray:
    f = unit(features)
    s = f @ f.T
    np.fill_diagonal(s, -np.inf)
    chosen = np.zeros(s.shape, bool)
    np.put_along_axis(chosen, np.argsort(-s, axis=1, kind="stable")[:, :k], True, 1)
    return chosen | chosen.T


def loss(streams, P, Q, M, weight, tokens, tau=0.8, tau_b=0.07, weighting="pairs", Q_in_E=False) -> float:
    """streams: (N, D) arrays; P, Q: bool (N, N), Q may be None; M: bool (R, N) or None for every column."""
    n = P.shape[0]
    P = P & ~np.eye(n, dtype=bool)
    Q = np.zeros_like(P) if Q is None else Q & ~np.eye(n, dtype=bool)
    rows = np.ones((1, n), bool) if M is None else M
    E = (P | (Q if Q_in_E else False) | np.tile(rows, (n // len(rows), 1))) & ~np.eye(n, dtype=bool)
    total, images = 0.0, n // tokens
    for x in streams:
        logits = unit(x) @ unit(x).T / tau
        denominator = np.where(E, np.exp(logits), 0).sum(1)
        lse = np.log(denominator, out=np.zeros(n), where=denominator > 0)
        cost = lse[:, None] - logits
        for b in range(images):
            own = slice(b * tokens, (b + 1) * tokens)
            p, q, c = P[own], Q[own], cost[own]
            kept = p.any(1)
            if weighting == "separate":
                total += (p * c).sum() / p.sum() if p.any() else 0.0
                total += weight * (q * c).sum() / q.sum() if q.any() else 0.0
                continue
            W = kept[:, None] * (p + weight * q)
            if not kept.any():
                continue
            if weighting == "pairs":
                total += (W * c).sum() / W.sum()
            else:
                total += ((W * c).sum(1)[kept] / W.sum(1)[kept]).mean()
    return tau / tau_b * total / (images * len(streams))
