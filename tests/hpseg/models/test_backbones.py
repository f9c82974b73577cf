"""Three ViT families, weights in every supported form, and what is said when weights cannot be had."""

import os
import socket
import time

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny import ARCH, SMALL, make_vit

from hpseg.models.backbone import Backbone, load_backbone
from hpseg.models.weights import DINO_FILES, OTHER_S8, PUBLISHED_S8, dino_url, load_weights, note_on, timm_source
from hpseg.run.errors import UsageError

FAMILIES = {  # timm name: settings that make it tiny
    "vit_small_patch8_224.dino": dict(embed_dim=32, depth=2, num_heads=2, img_size=32),
    "vit_small_patch14_reg4_dinov2.lvd142m": dict(embed_dim=32, depth=2, num_heads=2, img_size=56),
    "vit_small_patch16_dinov3.lvd1689m": dict(embed_dim=32, depth=2, num_heads=2, img_size=64),
    "vit_small_patch16_224.augreg_in1k": dict(embed_dim=32, depth=2, num_heads=2, img_size=64, qk_norm=True),
}


def make_backbone(name, **settings):
    import timm

    vit = timm.create_model(name, pretrained=False, num_classes=0, dynamic_img_size=True, **settings)
    return Backbone(vit, name, (0.5,) * 3, (0.25,) * 3)


def last_attention(backbone, images):
    """Softmaxed attention (B, heads, N, N) of the last block, taken from timm's unfused path."""
    attention, maps = backbone.vit.blocks[-1].attn, []
    fused, attention.fused_attn = attention.fused_attn, False
    hook = attention.attn_drop.register_forward_hook(lambda module, inputs, output: maps.append(output))
    with torch.no_grad():
        backbone.vit.forward_features((images - 0.5) / 0.25)
    hook.remove()
    attention.fused_attn = fused
    return maps[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_attention_of_the_last_block(name):
    backbone = make_backbone(name, **FAMILIES[name])
    vit, (rows, columns) = backbone.vit, (3, 5)
    images = torch.rand(2, 3, rows * backbone.patch, columns * backbone.patch)
    softmaxed = last_attention(backbone, images)
    prefix = vit.num_prefix_tokens
    assert softmaxed.shape == (2, 2, rows * columns + prefix, rows * columns + prefix)
    torch.testing.assert_close(softmaxed.sum(-1), torch.ones(softmaxed.shape[:3]))

    plain, full = backbone(images), backbone(images, with_neighbors=True)
    assert plain.neighbors is None and full.grid == (rows, columns)
    assert full.features.shape == (2, rows * columns, 32) and full.neighbors.shape == (2, rows * columns, 9)
    torch.testing.assert_close(plain.features, full.features, rtol=1e-4, atol=1e-5)
    # The final norm is applied: forward_features gives the same tokens behind the prefix.
    torch.testing.assert_close(
        plain.features, backbone.vit.forward_features((images - 0.5) / 0.25)[:, prefix:], rtol=1e-4, atol=1e-5
    )
    expected = weights_by_hand(softmaxed[..., prefix:, prefix:].log().mean(1), rows, columns)
    torch.testing.assert_close(full.neighbors, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("fused", [True, False])
def test_the_last_block_stays_fused_and_is_left_as_it_was(fused):
    name = "vit_small_patch16_dinov3.lvd1689m"
    backbone = make_backbone(name, **FAMILIES[name])
    attention = backbone.vit.blocks[-1].attn
    attention.fused_attn = fused
    before = dict(vars(attention))
    attention.attn_drop.register_forward_hook(lambda *_: pytest.fail("the attention map was made"))
    backbone(torch.rand(1, 3, 48, 48), with_neighbors=True)
    assert vars(attention) == before
    attention.proj_drop.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        backbone(torch.rand(1, 3, 48, 48), with_neighbors=True)
    assert vars(attention) == before


def test_differential_attention_has_no_logits():
    settings = dict(embed_dim=32, depth=2, num_heads=2, img_size=64)
    backbone = make_backbone("vit_dlittle_patch16_reg1_gap_256.sbb_nadamuon_in1k", **settings)
    with pytest.raises(UsageError, match="makes 2 attention products, expected one"):
        backbone(torch.rand(1, 3, 64, 64), with_neighbors=True)


def weights_by_hand(logits, rows, columns):
    """Neighbour weights, step by step: clamp to 10-90 % quantiles, softmax, drop what is below the row mean."""
    low, high = torch.quantile(logits, 0.1, -1, keepdim=True), torch.quantile(logits, 0.9, -1, keepdim=True)
    p = logits.clamp(low, high).softmax(-1)
    p = torch.where(p >= p.mean(-1, keepdim=True) * (1 - 1e-6), p, 0)
    out = torch.zeros(*logits.shape[:2], 9)
    for y in range(rows):
        for x in range(columns):
            taps = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if 0 <= y + dy < rows and 0 <= x + dx < columns]
            for dy, dx in taps:
                out[:, y * columns + x, 3 * dy + dx + 4] = (
                    28 * p[:, y * columns + x, (y + dy) * columns + x + dx] / len(taps)
                )
    return out


def test_frozen_and_sizes(vit_file):
    backbone = load_backbone(weights=vit_file)
    assert not any(p.requires_grad for p in backbone.parameters()) and not backbone.train().vit.training
    assert [backbone.snap(pixels) for pixels in (1, 27, 29, 224)] == [16, 24, 32, 224]
    with pytest.raises(ValueError, match="multiples of 8"):
        backbone(torch.rand(1, 3, 30, 32))
    as_bytes = torch.randint(0, 256, (1, 3, 32, 40), dtype=torch.uint8)
    torch.testing.assert_close(backbone(as_bytes).features, backbone(as_bytes / 255).features)
    half = load_backbone(weights=vit_file, dtype="bf16")(as_bytes, with_neighbors=True)
    assert half.features.dtype == torch.float32 and half.neighbors.isfinite().all()
    torch.testing.assert_close(half.features, backbone(as_bytes).features, rtol=0.1, atol=0.1)


def dino(prefix, state):
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize(
    "form", ["timm.safetensors", "timm.pth", "half.safetensors", "teacher.pth", "module.pt", "model.pth", "student.pth"]
)
def test_weight_files(tmp_path, vit_file, form):
    state = make_vit(seed=3).state_dict()
    path = tmp_path / form
    path.with_suffix(".json").write_bytes(vit_file.with_suffix(".json").read_bytes())
    if form == "half.safetensors":
        save_file({key: value.half() for key, value in state.items()}, path)
    elif form == "timm.safetensors":
        save_file(state, path)
    else:
        head = {"head.mlp.0.weight": torch.zeros(2, 2)}
        torch.save(
            {
                "timm.pth": state,
                "teacher.pth": {"student": {}, "teacher": dino("backbone.", {**state}) | head, "epoch": 3},
                "module.pt": dino("module.backbone.", state),
                "model.pth": {"model": state},
                "student.pth": {  # a DINO training checkpoint: the teacher is taken, both prefixes and its head go
                    "student": dino("module.backbone.", make_vit(seed=4).state_dict()),
                    "teacher": dino("module.backbone.", state) | {"module.head.last_layer.weight_v": torch.zeros(2, 2)},
                    "optimizer": {"state": {}, "param_groups": []},
                },
            }[form],
            path,
        )
    loaded = load_backbone(weights=path).vit.state_dict()
    for key, value in state.items():
        torch.testing.assert_close(loaded[key], value, rtol=2e-3, atol=1e-5)


def test_position_embedding_is_resampled(tmp_path):
    from timm.models.vision_transformer import VisionTransformer

    bigger = VisionTransformer(num_classes=0, global_pool="", dynamic_img_size=True, **{**ARCH, "img_size": 64})
    save_file(make_vit().state_dict(), tmp_path / "w.safetensors")
    load_weights(bigger, tmp_path / "w.safetensors")
    assert bigger.pos_embed.shape[1] == 65


def bicubic_by_hand(table, grid):
    """DINO's resampling of a table (n, m, C), value by value: Keys' kernel with a = -0.75, edges repeated, samples at
    (i + 0.5) n / (h + 0.1) - 0.5."""

    def weights(size, wanted):
        matrix = np.zeros((wanted, size))
        for i in range(wanted):
            at = (i + 0.5) * size / (wanted + 0.1) - 0.5
            for tap in range(int(np.floor(at)) - 1, int(np.floor(at)) + 3):
                d, a = abs(at - tap), -0.75
                near = (a + 2) * d**3 - (a + 3) * d**2 + 1
                far = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
                matrix[i, min(max(tap, 0), size - 1)] += near if d <= 1 else far if d < 2 else 0
        return matrix

    rows, columns = weights(table.shape[0], grid[0]), weights(table.shape[1], grid[1])
    return np.einsum("yi,xj,ijc->yxc", rows, columns, table)


@pytest.mark.parametrize("grid", [(5, 5), (40, 40), (3, 7), (28, 30), (28, 28)])
def test_position_embedding_as_dino_resamples_it(grid):
    from timm.models.vision_transformer import VisionTransformer

    vit = VisionTransformer(num_classes=0, global_pool="", dynamic_img_size=True, **{**ARCH, "img_size": 224})
    torch.nn.init.normal_(vit.pos_embed)
    table, images = vit.pos_embed.detach().clone(), torch.rand(1, 3, 8 * grid[0], 8 * grid[1])
    found, as_timm = (Backbone(vit, "vit", (0.5,) * 3, (0.25,) * 3, "fp32", kind)(images) for kind in ("dino", "timm"))
    assert torch.equal(vit.pos_embed, table)
    # A ViT whose own grid is the wanted one and whose table was resampled by hand.
    patches = torch.from_numpy(bicubic_by_hand(table[0, 1:].view(28, 28, -1).double().numpy(), grid)).float()
    if grid == (28, 28):
        patches = table[0, 1:].view(28, 28, -1)
        assert torch.equal(found.features, as_timm.features)
    else:
        assert (found.features - as_timm.features).abs().max() > 0.01
    own = VisionTransformer(num_classes=0, global_pool="", **{**ARCH, "img_size": (8 * grid[0], 8 * grid[1])})
    state = {**vit.state_dict(), "pos_embed": torch.cat([table[:, :1], patches.flatten(0, 1)[None]], 1)}
    own.load_state_dict(state)
    with torch.no_grad():
        expected = own.eval().forward_features((images - 0.5) / 0.25)[:, 1:]
    torch.testing.assert_close(found.features, expected, rtol=1e-4, atol=1e-4)


def test_other_families_take_both_position_embeddings():
    for name, settings in FAMILIES.items():
        plain, images = make_backbone(name, **settings), torch.rand(1, 3, 112, 112)
        backbone = Backbone(plain.vit, name, (0.5,) * 3, (0.25,) * 3, pos_embed="dino")
        assert plain(images).grid == backbone(images, with_neighbors=True).grid
        if plain.vit.pos_embed is None:  # rotary: there is no table
            assert torch.equal(plain(images).features, backbone(images).features)


def test_position_embedding_is_kept_with_the_run(photos, vit_file, tmp_path):
    import hpseg

    settings = dict(weights=vit_file, steps=2, pos_embed="dino", **{**SMALL, "size": 40})
    hpseg.train(photos, tmp_path / "run", **settings)
    assert hpseg.load(tmp_path / "run", device="cpu").backbone.pos_embed == "dino"
    with pytest.raises(UsageError, match="pos_embed: .* started with 'dino', got 'timm'"):
        hpseg.train(photos, tmp_path / "run", resume=True, **{**settings, "pos_embed": "timm"})
    with pytest.raises(UsageError, match="pos_embed: expected one of timm, dino, got 'dinov2'"):
        hpseg.train(photos, tmp_path / "other", **{**settings, "pos_embed": "dinov2"})


def test_the_original_files_are_those_timm_says_it_has():
    import timm

    for file, name in DINO_FILES.items():
        if name is not None:
            assert timm.models.get_pretrained_cfg(name).url == dino_url(file)
    assert DINO_FILES[PUBLISHED_S8] is None and DINO_FILES[OTHER_S8] == "vit_small_patch8_224.dino"
    vit = timm.create_model("vit_small_patch8_224.dino", pretrained=False)
    assert timm_source(vit) == OTHER_S8 and PUBLISHED_S8 in note_on(OTHER_S8)
    assert note_on(PUBLISHED_S8) is None and note_on("dino_vitbase8_pretrain.pth") is None


def test_an_original_file_by_its_name(photos, tmp_path, monkeypatch, news):
    """The published ViT-S/8 with its file's name and layout: a plain dictionary with DINO's key names."""
    import timm

    import hpseg

    small = dict(depth=1, embed_dim=128, num_heads=2, img_size=32)
    vit = timm.create_model("vit_small_patch8_224.dino", pretrained=False, num_classes=0, **small)
    monkeypatch.chdir(tmp_path)
    for name in ("embedded", "vit_small_patch8_224.dino"):
        with pytest.raises(UsageError, match=f"no file .*{PUBLISHED_S8}; download it from https:"):
            load_backbone(name, PUBLISHED_S8)
    for file, noted in ((PUBLISHED_S8, False), (OTHER_S8, True)):
        torch.save(vit.state_dict(), file)
        backbone = load_backbone(weights=file)
        assert (backbone.source, backbone.patch, len(backbone.vit.blocks)) == (file, 8, 1)
        assert all(torch.equal(value, vit.state_dict()[key]) for key, value in backbone.vit.state_dict().items())
        results = hpseg.train(photos, file[:-4], weights=file, steps=1, **{**SMALL, "quiet": False})
        assert results["backbone"] == {"name": "embedded", "weights": file, "fingerprint": backbone.fingerprint}
        assert any("STEGO and Hidden Positives publish" in line for line in news()) is noted


def test_a_plain_vit_needs_no_description(tmp_path):
    from timm.models.vision_transformer import VisionTransformer

    vit = VisionTransformer(
        num_classes=0,
        global_pool="",
        img_size=48,
        patch_size=16,
        embed_dim=128,
        depth=3,
        num_heads=2,
        dynamic_img_size=True,
    ).eval()
    torch.save({"teacher": dino("backbone.", vit.state_dict())}, tmp_path / "w.pth")
    backbone = load_backbone(weights=tmp_path / "w.pth")
    assert (backbone.patch, backbone.channels, len(backbone.vit.blocks)) == (16, 128, 3)
    x = torch.rand(1, 3, 48, 48)
    torch.testing.assert_close(backbone(x).features, vit.forward_features((x - backbone.mean) / backbone.std)[:, 1:])
    torch.save({"conv1.weight": torch.zeros(3, 3)}, tmp_path / "cnn.pth")
    with pytest.raises(UsageError, match="not a plain ViT; name its architecture with --backbone"):
        load_backbone(weights=tmp_path / "cnn.pth")


def test_weight_files_that_do_not_fit(tmp_path, vit_file):
    (tmp_path / "w.json").write_bytes(vit_file.with_suffix(".json").read_bytes())
    state = make_vit().state_dict()
    path = tmp_path / "w.pth"
    for content, message in (
        (b"rubbish", "not a torch file"),
        ({"epoch": 3}, "holds no backbone tensors"),
        ([1, 2], "holds a list"),
        ({k: v for k, v in state.items() if "fc1" not in k}, "4 tensors missing"),
        ({**state, "extra": torch.zeros(1)}, "1 unexpected"),
        ({**state, "norm.weight": torch.zeros(5)}, "does not fit"),
    ):
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        with pytest.raises(UsageError, match=message):
            load_backbone(weights=path)
    (tmp_path / "w.safetensors").write_bytes(b"rubbish")
    with pytest.raises(UsageError, match="not a readable safetensors"):
        load_backbone(weights=tmp_path / "w.safetensors")


def test_names_that_are_no_plain_vit():
    with pytest.raises(UsageError, match="vit_smal_patch8_224.*near names"):
        load_backbone("vit_smal_patch8_224", pretrained=False)
    with pytest.raises(UsageError, match="backbone: "):
        load_backbone("resnet18", pretrained=False)
    with pytest.raises(UsageError, match="no pretrained weights for 'vit_tiny_patch16_384'|cannot be reached"):
        os.environ["HF_HUB_OFFLINE"] = "1"
        try:
            load_backbone("vit_tiny_patch16_384")
        finally:
            del os.environ["HF_HUB_OFFLINE"]


@pytest.mark.parametrize("kind", ["refused", "silent"])
def test_unreachable_weights_say_what_else_to_do_within_15_seconds(tmp_path, monkeypatch, kind):
    from huggingface_hub import constants

    server = socket.create_server(("127.0.0.1", 0))  # accepts and never answers
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    if kind == "refused":
        server.close()
    start = time.monotonic()
    with pytest.raises(UsageError, match="cannot be reached .*--weights FILE.*--backbone embedded"):
        load_backbone("vit_small_patch8_224.dino")
    assert time.monotonic() - start < 15
    server.close()
