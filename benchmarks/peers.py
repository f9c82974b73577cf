"""Other libraries at the jobs of benchmarks/cases.py, imported only where one is measured, and why one is not.

The contrastive libraries compute the log-sum-exp of all pairs and its gradient in linear memory, for one positive a
row. The supervised loss needs two things more, both in O(N D) plain torch: the row itself leaves the denominator by
log(1 - exp(s_ii - lse)), and the mean over the positives comes from sums of the rows of each class.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import warnings
from dataclasses import dataclass
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from hpkernels import dispatch

PREFIX = "hpkernels-"  # + backend


@dataclass(frozen=True)
class Package:
    module: str
    distribution: str
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    limits: str  # why not other devices or dtypes


HALVES = (torch.bfloat16, torch.float16)
ANY = (torch.float32, *HALVES)
PACKAGES = {
    "pytorch-metric-learning": Package("pytorch_metric_learning", "pytorch-metric-learning", ("cpu", "cuda"), ANY, ""),
    "cut-cross-entropy": Package(
        "cut_cross_entropy",
        "cut-cross-entropy",
        ("cuda",),
        HALVES,
        "its Triton kernels take bf16 and fp16 tensors on a GPU",
    ),
    "inf-cl": Package(
        "inf_cl", "inf-cl", ("cuda",), HALVES, "its Triton kernels need a GPU and multiply in TF32, not in fp32"
    ),
    "keops": Package("pykeops", "pykeops", ("cpu", "cuda"), ANY, ""),
    "scikit-learn": Package("sklearn", "scikit-learn", ("cpu",), (torch.float32,), "it takes fp32 and fp64 on a CPU"),
    "faiss": Package("faiss", "faiss-cpu", ("cpu",), (torch.float32,), "faiss-cpu takes fp32 on a CPU"),
    "flash-kmeans": Package("flash_kmeans", "flash-kmeans", ("cuda",), ANY, "its Triton kernels need a GPU"),
    "fastkmeans": Package("fastkmeans", "fastkmeans", ("cpu", "cuda"), ANY, ""),
    "siglip-kernel": Package(
        "siglip_kernel",
        "siglip-kernel",
        ("cuda",),
        HALVES,
        "its Triton kernels need a GPU, and fp32 goes through others than those it is known for",
    ),
}


def why_not(peer: str, device: str, dtype: torch.dtype) -> str | None:
    """The reason a peer cannot be measured here, or None."""
    if peer.startswith(PREFIX):
        return dispatch.why_not(peer.removeprefix(PREFIX), torch.device(device))
    if peer == "torch-linear-cross-entropy" and not hasattr(F, "linear_cross_entropy"):
        return f"torch {torch.__version__} has no linear_cross_entropy"
    package = PACKAGES.get(peer)
    if package is None:
        return None
    if device not in package.devices or dtype not in package.dtypes:
        return f"not on {device} in {str(dtype).removeprefix('torch.')}: {package.limits}"
    if importlib.util.find_spec(package.module) is None:
        return f"{package.distribution} is not installed (pip install '.[bench]')"
    return None


def version(peer: str) -> str | None:
    """Version of the peer's package; None for those that are this package or plain torch."""
    try:
        return importlib.metadata.version(PACKAGES[peer].distribution) if peer in PACKAGES else None
    except importlib.metadata.PackageNotFoundError:
        return None


def metric_learning_supcon(z: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Its mean leaves out rows of loss 0, which are the rows without a positive."""
    from pytorch_metric_learning.losses import SupConLoss

    return SupConLoss(temperature=temperature)(z, labels)


def cut_cross_entropy_supcon(z: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Without its gradient filter, which drops small probabilities."""
    from cut_cross_entropy import linear_cross_entropy

    x = F.normalize(z, dim=1)
    scaled = x / temperature
    itself = torch.arange(len(x), device=x.device)
    above_self = linear_cross_entropy(scaled, x, itself, reduction="none", filter_eps=None).float()
    return _supcon(x, scaled, above_self, labels)


def inf_cl_supcon(z: Tensor, labels: Tensor, temperature: float) -> Tensor:
    from inf_cl import cal_flash_loss

    x = F.normalize(z, dim=1)
    above_self = cal_flash_loss(x, x, scale=1 / temperature, head_dim=_head(x.shape[1]))
    return _supcon(x, x / temperature, above_self, labels)


def _head(width: int) -> int:
    """Of inf-cl's blocks: the largest that divides the rows."""
    return next(head for head in (256, 128, 64, 32, 16) if width % head == 0)


def keops_supcon(z: Tensor, labels: Tensor, temperature: float) -> Tensor:
    from pykeops.torch import LazyTensor

    x = F.normalize(z, dim=1).float()
    scaled = x / temperature
    lse = (LazyTensor(scaled[:, None, :]) | LazyTensor(x[None, :, :])).logsumexp(1).squeeze(1)
    return _supcon(x, scaled, lse - (scaled * x).sum(1), labels)


def _one_positive(z: Tensor, keys: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Unit rows over the temperature, unit keys, and the numbers of the keys that are positives."""
    scaled = F.normalize(z, dim=1) / temperature
    return scaled, F.normalize(keys, dim=1), torch.arange(len(z), device=z.device)


def torch_linear_cross_entropy(z: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """The keys as weights of the classes; in blocks, where this torch has that form."""
    options = (
        {"options": torch.nn.LinearCrossEntropyOptions()} if hasattr(torch.nn, "LinearCrossEntropyOptions") else {}
    )
    return F.linear_cross_entropy(*_one_positive(z, keys, temperature), **options)


def cut_cross_entropy_infonce(z: Tensor, keys: Tensor, temperature: float) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(*_one_positive(z, keys, temperature), filter_eps=None)


def inf_cl_infonce(z: Tensor, keys: Tensor, temperature: float) -> Tensor:
    from inf_cl import cal_flash_loss

    x, keys = F.normalize(z, dim=1), F.normalize(keys, dim=1)
    return cal_flash_loss(x, keys, scale=1 / temperature, head_dim=_head(x.shape[1])).mean()


SIGLIP_BIAS = -10.0


def siglip_kernel(z: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """Another loss of the same products: each pair by itself, a sigmoid in the place of the log-sum-exp."""
    from siglip_kernel import fused_siglip_loss

    log_temperature, bias = (torch.tensor(value, device=z.device) for value in (-math.log(temperature), SIGLIP_BIAS))
    return fused_siglip_loss(F.normalize(z, dim=1), F.normalize(keys, dim=1), log_temperature, bias)


def keops_topk(queries: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k smallest of -<q, key>; values recomputed for the k found."""
    from pykeops.torch import LazyTensor

    distance = -(LazyTensor(queries[:, None, :]) | LazyTensor(keys[None, :, :]))
    indices = distance.argKmin(k, dim=1)
    return torch.stack([(queries * keys[column]).sum(1) for column in indices.T], 1), indices


def faiss_topk(queries: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(keys.shape[1])
    index.add(keys.numpy())
    values, indices = index.search(queries.numpy(), k)
    return torch.from_numpy(values), torch.from_numpy(indices)


def sklearn_kmeans(x: Tensor, start: Tensor, iterations: int) -> Tensor:
    """Its own copy and centring of x, and its last pass for labels, are part of the job."""
    from sklearn.cluster import KMeans

    options = {"n_clusters": len(start), "n_init": 1, "max_iter": iterations, "tol": 0, "algorithm": "lloyd"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it has not converged
        return torch.from_numpy(KMeans(init=start.numpy(), **options).fit(x.numpy()).cluster_centers_)


def flash_kmeans(x: Tensor, start: Tensor, iterations: int) -> Tensor:
    """One pass less than the job's: its labels are those before the last move of the centroids."""
    from flash_kmeans import batch_kmeans_Euclid

    _, centroids, _ = batch_kmeans_Euclid(
        x[None], len(start), max_iters=iterations, tol=-1.0, init_centroids=start[None]
    )
    return centroids[0]


def fastkmeans(x: Tensor, rows: Tensor, iterations: int) -> Tensor:
    """From rows `rows` of x, which it would draw with torch.randperm. It takes numbers of numpy, in fp32.

    16-bit runs are in fp16, its own choice on a GPU: in bf16 its sums miss the tolerance.
    """
    from fastkmeans import FastKMeans

    k, dtype = len(rows), torch.float32 if x.dtype == torch.float32 else torch.float16
    model = FastKMeans(x.shape[1], k, niter=iterations, tol=-1.0, gpu=x.is_cuda, dtype=dtype)
    with mock.patch.object(torch, "randperm", lambda n: rows.cpu()):
        model.train(x.float().cpu().numpy())
    return torch.from_numpy(model.centroids)


def _supcon(x: Tensor, scaled: Tensor, above_self: Tensor, labels: Tensor) -> Tensor:
    """The loss from above_self_i = log sum_j exp(s_ij) - s_ii over all j, of rows x and scaled = x / temperature."""
    x, scaled = x.float(), scaled.float()
    own = (scaled * x).sum(1)
    lse = own + above_self + torch.log1p(-torch.exp(-above_self))
    classes = int(labels.max()) + 1
    sums = torch.zeros(classes, x.shape[1], device=x.device).index_add(0, labels, x)
    counts = torch.bincount(labels)[labels] - 1
    positives = ((scaled * sums[labels]).sum(1) - own) / counts.clamp_min(1)
    return torch.where(counts > 0, lse - positives, 0.0).sum() / (counts > 0).sum()
