"""FS^4: its losses and its context-aware embedding against fp64 numpy, its clusters, switches, resumption and use."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from runs import assert_same, state_of, train_until
from tiny import paint

import hpkernels
import hpseg
from hpseg.evaluation.evaluate import evaluate
from hpseg.interop import torch_export as exporting
from hpseg.methods.fs4.context_embedding import ContextEmbedding, ContextHead, grid_positions
from hpseg.methods.fs4.method import Fs4, PixelClusters, pooled
from hpseg.models.backbone import Tokens
from hpseg.models.heads import SegmentationHead
from hpseg.run.config import make_config
from hpseg.run.errors import UsageError
from hpseg.runtime.distributed import ALONE, Share

TINY = dict(
    method="fs4", classes=3, batch_size=2, size=32, predict_size=48, dim=16, context_dim=8, pyramid_clusters="3,5,6",
    workers=0, device="cpu", quiet=True,
)  # fmt: skip
UNCACHED = dict(cache_features=False, clusters="probe")


def settings(**changes):
    return make_config(**{**{k: v for k, v in TINY.items() if k != "quiet"}, "images": "x", **changes})


def share_of(batch):
    return Share(ALONE, batch, torch.Generator())


def tokens(batch=2, grid=(4, 4), channels=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    count = grid[0] * grid[1]
    features, colours = (torch.randn(batch, count, n, generator=generator) for n in (channels, 3))
    return Tokens(features, None, grid, colours.sigmoid())


def drawn(method, seed=0):
    """Every parameter and buffer random, so that nothing is 0 by its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for x in [*method.parameters(), *method.buffers()]:
            x.copy_(torch.randn(x.shape, generator=generator) * 0.4)
        for clusters in method.pixels:
            clusters.centroids /= clusters.centroids.norm(dim=1, keepdim=True)
            clusters.counts.copy_(torch.randint(1, 50, clusters.counts.shape, generator=generator))
    return method


def array(x):
    return x.detach().double().numpy()


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def cross_entropy(logits, labels):
    """Of each row."""
    largest = logits.max(1, keepdims=True)
    lse = np.log(np.exp(logits - largest).sum(1)) + largest[:, 0]
    return lse - logits[np.arange(len(labels)), labels]


def test_context_embedding_equals_its_equations():
    torch.manual_seed(0)
    view = tokens(grid=(3, 5))
    embedding = ContextEmbedding(12, 8, 2, 0.3, 0.2, "fp32")
    assert torch.equal(embedding(view), view.features)  # W_o starts at 0
    torch.nn.init.normal_(embedding.out.weight)
    f, c = array(view.features), array(view.colours)
    rows, columns = np.mgrid[:3, :5]
    p = np.stack([rows.ravel() - 1.0, columns.ravel() - 2.0], 1) / 3
    np.testing.assert_allclose(array(grid_positions((3, 5), view.features)), p, atol=1e-7)

    def waves(x):
        angles = (x[..., None] * math.pi * np.array([1.0, 2.0])).reshape(*x.shape[:-1], -1)
        return np.concatenate([np.sin(angles), np.cos(angles)], -1)

    def linear(layer, x):
        y = x @ array(layer.weight).T
        return y if layer.bias is None else y + array(layer.bias)

    expected = np.empty_like(f)
    for b in range(2):
        q, k = linear(embedding.queries, f[b]), linear(embedding.keys, f[b])
        v = linear(embedding.values, np.concatenate([f[b], waves(p), waves(c[b])], 1))
        e = q @ k.T / np.sqrt(8)
        e -= ((p[:, None] - p[None]) ** 2).sum(-1) / (2 * 0.3**2)
        e -= ((c[b][:, None] - c[b][None]) ** 2).sum(-1) / (2 * 0.2**2)
        a = np.exp(e) / np.exp(e).sum(1, keepdims=True)
        expected[b] = f[b] + linear(embedding.out, a @ v)
    np.testing.assert_allclose(array(embedding(view)), expected, atol=2e-5)
    embedding(view).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in embedding.parameters())


@pytest.mark.parametrize("balance", ["size", "inverse", "none"])
@pytest.mark.parametrize("twins", [False, True])
def test_pixel_loss_equals_its_formula(twins, balance):
    weight = 0.5 if twins else 0.0
    config = settings(
        consistency_weight=weight, cache_features=False, pixel_weight=1.5, pixel_temperature=0.4, pixel_balance=balance,
        pyramid_weight=0.0,
    )  # fmt: skip
    method = drawn(Fs4(12, config))
    views = [tokens(seed=1), tokens(seed=2)][: 1 + twins]
    found = method.losses(views[0], views[1] if twins else None, 0, 0, share_of(2))
    assert found["pyramid"] == 0
    codes = [unit(array(method.head(view))).reshape(-1, 16) for view in views]
    guesses = [unit(array(method.labeller(view))).reshape(-1, 16) for view in views]
    centroids = [array(clusters.centroids) for clusters in method.pixels]
    labels = [(g @ m.T).argmax(1) for g, m in zip(guesses, centroids, strict=True)]

    def term(of, by):
        counts = array(method.pixels[by].counts)
        shares = counts / counts.sum()
        w = {"size": shares, "inverse": 1 / (3 * shares), "none": np.ones(3)}[balance][labels[by]]
        return (w * cross_entropy(codes[of] @ centroids[by].T / 0.4, labels[by])).sum() / w.sum()

    if twins:
        within, across = (term(0, 0) + term(1, 1)) / 2, (term(0, 1) + term(1, 0)) / 2
        expected = (within + weight * across) / (1 + weight)
    else:
        expected = term(0, 0)
    assert found["pixel"].item() == pytest.approx(1.5 * expected, rel=1e-5)


def test_pyramid_loss_equals_its_formula():
    method = drawn(Fs4(12, settings(pyramid_weight=0.7, pixel_weight=0.0)))
    view = tokens()
    found = method.losses(view, None, 0, 0, share_of(2))
    assert found["pixel"] == 0
    features, codes = array(view.features).reshape(2, 4, 4, 12), unit(array(method.head(view))).reshape(2, 4, 4, 16)
    terms = []
    for level, cells in enumerate((1, 2, 4)):
        side, losses = 4 // cells, []
        groups, classifier = array(getattr(method, f"groups_{level}")), method.classifiers[level]
        for b in range(2):
            for y in range(0, 4, side):
                for x in range(0, 4, side):
                    cell = (b, slice(y, y + side), slice(x, x + side))
                    label = (unit(groups) @ features[cell].mean((0, 1))).argmax()
                    logits = array(classifier.weight) @ codes[cell].mean((0, 1)) + array(classifier.bias)
                    losses.append(cross_entropy(logits[None], np.array([label]))[0])
        terms.append(np.mean(losses))
    assert found["pyramid"].item() == pytest.approx(0.7 * np.mean(terms), rel=1e-5)


def test_cells_are_as_even_as_can_be():
    maps = torch.arange(25.0).view(1, 25, 1)
    assert pooled(maps, (5, 5), 1).item() == 12
    assert pooled(maps, (5, 5), 2).flatten().tolist() == [6, 8, 16, 18]  # 3 x 3 cells that share the middle


def test_clusters_move_as_mini_batch_k_means():
    """The same as hpkernels.kmeans makes of the batches, which is tested against scikit-learn's formula."""
    torch.manual_seed(0)
    batches = [torch.nn.functional.normalize(torch.randn(n, 6), dim=1) for n in (40, 30, 50)]
    clusters = PixelClusters(4, 6)
    clusters.centroids.copy_(batches[0][:4])
    for batch in batches:
        found = hpkernels.assign_clusters(batch, clusters.centroids)
        clusters.move(found.sums, found.counts)
    expected = hpkernels.kmeans(batches, 4, init=batches[0][:4], spherical=True, iterations=1, batch_size=1000)
    torch.testing.assert_close(clusters.centroids, expected.centroids)
    assert clusters.counts.sum() == 120
    before = clusters.centroids.clone()
    clusters.move(torch.zeros(4, 6), torch.zeros(4, dtype=torch.int64))  # a batch without rows moves nothing
    torch.testing.assert_close(clusters.centroids, before)


def test_parts_are_switched_off():
    without = settings(context_attention=False, pyramid_weight=0.0)
    method = Fs4(12, without)
    assert method.head.context is None and not method.levels and not list(method.classifiers)
    view = tokens()
    assert torch.equal(method.head(view), method.head.head(view.features))
    assert {name.split(".")[0] for name, _ in method.named_parameters()} == {"head", "labeller", "clusters"}
    for part in ("pixel", "pyramid"):  # what is off gives no gradient
        method = drawn(Fs4(12, settings(**{f"{part}_weight": 0.0})))
        terms = method.losses(view, None, 0, 0, share_of(2))
        other = "pyramid" if part == "pixel" else "pixel"
        assert terms[part] == 0 < terms[other]
        sum(terms.values()).backward()
        assert method.head.head.out.weight.grad.abs().sum() > 0


def test_a_window_is_a_view_of_its_own():
    """Context ends at the window: what lies beside it changes none of its codes."""
    torch.manual_seed(0)
    head = ContextHead(SegmentationHead(12, 4), ContextEmbedding(12, 8, 2, 0.3, 0.2, "fp32"))
    torch.nn.init.normal_(head.context.out.weight)
    whole, part = tokens(1, (4, 6)), tokens(1, (4, 4))
    assert head.codes_of(whole).shape == (1, 24, 4) and head.codes_of(part).shape == (1, 16, 4)
    mirrored = Tokens(part.features.flip(1), None, part.grid, part.colours.flip(1))
    # e(p) tells places apart
    assert not torch.allclose(head.codes_of(mirrored).flip(1), head.codes_of(part), atol=1e-3)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, photos, vit_file):
    out = tmp_path_factory.mktemp("fs4") / "run"
    results = hpseg.train(photos, out, weights=vit_file, steps=12, save_every=5, preview_every=6, **TINY)
    assert results["steps"] == 12
    return out


def test_a_run_is_used_like_any_other(trained, tmp_path):
    """Labels of a picture of any size, in windows, scores; a program that agrees at sizes it was not traced with."""
    assert len(list((trained / "preview").glob("*.png"))) == 2
    segmenter = hpseg.load(trained, device="cpu")
    assert segmenter.head.context.out.weight.abs().sum() > 0
    for width, height in ((50, 40), (40, 300)):
        labels = segmenter.predict(paint(width, height, 1))
        assert labels.shape == (height, width) and labels.max() < 3
    assert segmenter.predict(paint(60, 60, 1), window=24, stride=16, crf=True).shape == (60, 60)

    exporting.export(trained, tmp_path / "m.pt2")
    model = torch.export.load(tmp_path / "m.pt2").module()
    for size in ((16, 16), (48, 96), (136, 24)):
        images = torch.rand(1, 3, *size)
        expected = segmenter.similarities(segmenter(images))
        torch.testing.assert_close(model(images), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))

    for folder in ("images", "labels"):
        (tmp_path / "data" / folder).mkdir(parents=True)
    for number in range(3):
        paint(48, 40, number).save(tmp_path / "data" / "images" / f"{number}.png")
        Image.fromarray(np.arange(40 * 48).reshape(40, 48).astype(np.uint8) % 3).save(
            tmp_path / "data" / "labels" / f"{number}.png"
        )
    for protocol, flip in (("default", False), ("stego", True)):
        scores = evaluate(trained, tmp_path / "data", protocol=protocol, flip=flip, rgb=True, device="cpu")
        assert all(0 <= scores[name]["miou"] <= 100 for name in ("trained", "kmeans_features", "kmeans_rgb"))


def test_cached_colours_are_those_of_the_photograph(trained, photos, vit_file):
    """A view from the cache holds the mean colours of its patches, cut like its features."""
    from hpseg.features.tokens import Encoder
    from hpseg.models.backbone import load_backbone

    backbone = load_backbone("embedded", vit_file)
    dataset = Fs4.open_photographs(settings(images=str(photos), crop="center"), backbone)
    encoder = Encoder(backbone, dataset, settings(images=str(photos), crop="center"), torch.device("cpu"), trained)
    encoder.fill()
    ((view, _),) = encoder([[(0, 0), (0, 1)]])
    pixels = torch.stack([dataset[0, index][0] for index in (0, 1)]).float() / 255
    expected = pixels.unflatten(2, (4, 8)).unflatten(4, (4, 8)).mean((3, 5)).flatten(2).transpose(1, 2)
    # The window is a whole number of patches from the edge, the crop is central to the pixel.
    assert (view.colours - expected).abs().mean() < 0.1 and view.colours.shape == (2, 16, 3)


@pytest.mark.parametrize(
    "change",
    [
        dict(consistency_weight=1.0, pyramid_epochs=1, dropout=0.1, accumulate=2, **UNCACHED),
        dict(pixel_update="running", pyramid_weight=0.0),
    ],
    ids=["two views, all anew every epoch", "running"],
)
def test_resumes_bitwise(change, photos, vit_file, tmp_path):
    """Stopped between two checkpoints; centroids, counts, labels and groups go on as they would have."""
    options = {**dict(weights=vit_file, steps=11, save_every=4), **TINY, **change}
    hpseg.train(photos, tmp_path / "straight", **options)

    train_until(9, Fs4, photos, tmp_path / "cut", **options)
    assert state_of(tmp_path / "cut")["step"] == 8
    hpseg.train(photos, tmp_path / "cut", resume=True, **options)
    assert_same(state_of(tmp_path / "straight"), state_of(tmp_path / "cut"))


@pytest.mark.parametrize("update, epochs, times", [("epoch", 1, 5), ("epoch", 2, 3), ("running", 1, 1)])
def test_clusters_are_made_anew_with_the_epochs(update, epochs, times, photos, vit_file, tmp_path, monkeypatch):
    """Five photographs in batches of two are two steps an epoch: ten steps are five epochs."""
    made, cluster = [], Fs4._cluster_patches

    def counted(self, epoch, source):
        made.append(epoch)
        cluster(self, epoch, source)
        assert_same(dict(self.labeller.state_dict()), dict(self.head.state_dict()))

    monkeypatch.setattr(Fs4, "_cluster_patches", counted)
    options = TINY | dict(pixel_update=update, pixel_epochs=epochs)
    hpseg.train(photos, tmp_path / "run", weights=vit_file, steps=10, **options)
    assert made == list(range(0, 5, epochs))[:times]


@pytest.mark.parametrize(
    "change, message",
    [
        (
            dict(pyramid_levels="1,2"),
            "pyramid_clusters: expected a number for each of pyramid_levels '1,2', got '3,5,6'",
        ),
        (dict(pyramid_levels="1,2,x"), "pyramid_levels: expected numbers as '1,2,4', got '1,2,x'"),
        (dict(pyramid_clusters="3,0,6"), "pyramid_clusters: expected numbers as '27,100,200', got '3,0,6'"),
        (dict(pyramid_levels="1,2,9"), "pyramid_levels: expected at most the 4 patches along a view, got '1,2,9'"),
        (dict(classes=81), "classes: expected at most the 80 patches of all views, got 81"),
        (dict(pixel_weight=0, pyramid_weight=0), "pixel_weight, pyramid_weight: expected at least one above 0"),
        (dict(pixel_weight=0, clusters="probe"), "clusters: expected 'kmeans' with pixel_weight 0"),
        (dict(pixel_update="never"), "pixel_update: expected one of epoch, running, got 'never'"),
        (dict(position_sigma=0), "position_sigma: expected at least 0.01, got 0"),
        (dict(consistency_weight=1.0), "cache_features: there are no jittered views of cached features"),
        (dict(labeled="1/8"), "labeled: expected with method"),
    ],
)
def test_errors_name_the_setting(change, message, photos, vit_file, tmp_path):
    with pytest.raises(UsageError, match=f"^{message}"):
        hpseg.train(photos, tmp_path / "run", weights=vit_file, steps=2, **{**TINY, **change})
    assert not (tmp_path / "run").exists()
