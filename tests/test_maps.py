"""Equivalent attention maps: applied to the values they give what each attention layer computes.

pytest tests/test_maps.py
"""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import attention_maps
from benchmarks.common import WrongResultError
from data.transforms import Normalise
from models.attention import PolaLinearAttention
from models.attention_maps import LayerRecord, MapError, attention_layers, record
from models.kernels import KERNELS, LinearKernel
from models.nalaformer import NaLaFormer
from models.pola_pp import PolaPP
from models.pola_pvt import PolaPVT
from models.pola_swin import PolaSwin
from tools.overlays import ground, last_linear_layer, overlay, paint

SWIN = {"patch_size": 4, "embed_dim": 10, "num_heads": (1, 2, 2, 4), "kernel_size": 3, "num_classes": 3}
PVT = {
    "embed_dims": (6, 10, 12, 16),
    "num_heads": (1, 2, 2, 4),
    "mlp_ratios": (1, 1, 1, 1),
    "kernel_size": 3,
    "num_classes": 3,
}
PP = {"embed_dims": (8, 16, 8, 16), "num_heads": (1, 2, 1, 2), "projection": 8, "kernel_size": 3, "num_classes": 3}
MODELS = {
    "swin, one window": lambda: PolaSwin(img_size=(32, 64), depths=(1, 1, 1, 1), attn_type="LLLL", **SWIN),
    "swin, shifted padded windows": lambda: PolaSwin(
        img_size=(64, 32), depths=(2, 1, 1, 1), attn_type="LLSL", window_size=5, **SWIN
    ),
    "swin, shifted softmax windows": lambda: PolaSwin(img_size=(64, 32), depths=(2, 1, 1, 1), attn_type="SSSS", **SWIN),
    "swin, windows without padding": lambda: PolaSwin(
        img_size=(32, 64), depths=(2, 2, 1, 1), attn_type="LMSS1", window_size=4, qk_scale=0.7, **SWIN
    ),
    "pvt": lambda: PolaPVT(img_size=(32, 64), depths=(1, 1, 1, 1), attn_type="LLLL", **PVT),
    "pvt, reduced keys": lambda: PolaPVT(
        img_size=(32, 64), depths=(1, 1, 1, 1), attn_type="LLLL", sr_ratios=(4, 2, 2, 1), **PVT
    ),
    **{
        f"pvt, {kind} in place of polarity": lambda kind=kind: PolaPVT(
            img_size=(32, 64),
            depths=(1, 1, 1, 1),
            attn_type="LLLL",
            attention=kind,
            gate=kind != "elu",
            sr_ratios=(1, 2, 1, 1),
            **PVT,
        )
        for kind in KERNELS
        if kind != "polarity"
    },
    **{
        f"swin, shifted padded windows of {kind} attention": lambda kind=kind: PolaSwin(
            img_size=(64, 32), depths=(2, 1, 1, 1), attn_type="LLSS", window_size=5, attention=kind, **SWIN
        )
        for kind in ("focused", "norm_aware", "nala_cosine")
    },
    "pp, linear and softmax": lambda: PolaPP(img_size=(32, 64), depths=(1, 1, 1, 1), **PP),
    "nala, linear and softmax": lambda: NaLaFormer(img_size=(32, 64), depths=(1, 1, 1, 1), **PP),
    "pvt, softmax": lambda: PolaPVT(img_size=(64, 32), depths=(1, 1, 1, 1), attn_type="SSSS", **PVT),
}


def _model(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]().double().eval()
    for parameter in model.parameters():  # those that start at 0 too
        parameter.data.normal_(std=0.4)
    return model


def _images(model, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, *model.img_size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def _outputs(model, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The model's output and every attention module's own."""
    seen: dict[str, Tensor] = {}
    handles = [
        module.register_forward_hook(lambda m, inputs, output, name=name: seen.__setitem__(name, output))
        for name, module in attention_layers(model).items()
    ]
    with torch.no_grad():
        output = model(images)
    for handle in handles:
        handle.remove()
    return output, seen


def _unwindowed(tokens: Tensor, places: Tensor, size: int) -> Tensor:
    """(B, W, N, C) to (B, size, C)."""
    real = places >= 0
    out = tokens.new_full((len(tokens), size, tokens.shape[-1]), float("nan"))
    out[:, places[real]] = tokens[:, real]
    return out


def _through_rows(layer: LayerRecord, module: nn.Module) -> Tensor:
    """The attention module's output (B, H·W, C), computed from the rows of all queries."""
    queries = torch.arange(layer.grid[0] * layer.grid[1])
    keys = layer.key_grid[0] * layer.key_grid[1]
    values = _unwindowed(layer.v.transpose(2, 3).flatten(3), layer.key_places, keys)
    values = values.unflatten(-1, (layer.num_heads, -1)).transpose(1, 2)  # (B, h, n, d)
    if layer.convolution is None:
        mixed = layer.rows(queries) @ values
        return module.proj(mixed.transpose(1, 2).flatten(2))
    mixed = torch.empty_like(values[:, :, :1]).repeat(1, 1, len(queries), 1)
    for stream in _streams(layer):
        rows = layer.rows(queries, stream=stream)
        for channel in layer.channels(stream):
            own = rows + layer.depthwise_rows(queries, [channel])
            bias = (
                module.dwc.bias[channel]
                if hasattr(module, "dwc")
                else module.lepe.bias[channel :: values.shape[-1], None]
            )
            mixed[..., channel] = (own @ values[..., channel, None])[..., 0] + bias
    mixed = mixed.transpose(1, 2).flatten(2)
    g = None
    if layer.g is not None:
        g = _unwindowed(layer.g.transpose(2, 3).flatten(3), layer.query_places, len(queries))
    if hasattr(module, "out_proj"):  # NaLaFormer's surroundings
        return module.out_proj(module.ln(mixed) * F.silu(g))
    return module.proj(mixed if g is None else mixed * g)


def _streams(layer: LayerRecord) -> tuple[str, ...]:
    """Those that between them are applied to every value channel once."""
    return layer.kernel.streams or (layer.kind,)


@pytest.mark.parametrize("name", MODELS)
def test_rows_applied_to_the_values_give_the_module_output(name):
    model = _model(name)
    images = _images(model)
    output, outputs = _outputs(model, images)
    recording = record(model, images)
    assert torch.equal(recording.output, output)
    assert list(recording.layers) == list(attention_layers(model))
    for layer, module in attention_layers(model).items():
        seen = recording.layers[layer]
        expected = (
            outputs[layer].unflatten(0, (len(images), -1)) if len(seen.query_places) > 1 else outputs[layer][:, None]
        )
        expected = _unwindowed(expected, seen.query_places, seen.grid[0] * seen.grid[1])
        with torch.no_grad():
            deviation = (_through_rows(seen, module) - expected).abs().max() / expected.abs().max()
        assert deviation < 1e-10, (layer, deviation)


@pytest.mark.parametrize("name", MODELS)
def test_combined_map_with_the_depthwise_branch_is_the_mean_over_channels(name):
    model = _model(name)
    for layer in record(model, _images(model, 1)).layers.values():
        last = layer.grid[0] * layer.grid[1] - 1
        queries = [0, last // 2, last]
        if layer.convolution is None:
            with pytest.raises(MapError, match="softmax map has no depthwise branch"):
                layer.rows(queries, depthwise=True)
            continue
        d = layer.v.shape[-1]
        by_channel = []
        for stream in _streams(layer):
            for channel in layer.channels(stream):
                by_channel.append(layer.rows(queries, stream=stream) + layer.depthwise_rows(queries, [channel]))
        assert len(by_channel) == d
        assert torch.allclose(layer.rows(queries, depthwise=True), sum(by_channel) / d, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_chosen_rows_are_rows_of_the_whole_and_their_mean_is_what_keys_receive(name):
    model = _model(name)
    for layer in record(model, _images(model)).layers.values():
        everything = torch.arange(layer.grid[0] * layer.grid[1])
        chosen = everything.flip(0)[::3]
        for stream in layer.streams:
            rows = layer.rows(everything, stream=stream)
            head = layer.num_heads - 1
            assert torch.allclose(layer.rows(chosen, head=head, stream=stream)[:, 0], rows[:, head, chosen])
            assert torch.allclose(layer.received(stream=stream), rows.mean(dim=2), rtol=1e-9, atol=1e-14)
            if layer.rotary is None or stream not in layer.own_streams:
                assert rows.min() >= 0 and rows.sum(dim=-1).max() < 1 + 1e-9
            else:
                assert rows.min() < 0 and not torch.allclose(rows.sum(dim=-1), torch.ones_like(rows[..., 0]), atol=1e-3)


def test_comparison_maps_are_softmax_and_relu_attention_over_the_same_queries_and_keys():
    layer = next(iter(record(_model("pvt"), _images(_model("pvt"))).layers.values()))
    q, k = layer.q[:, 0], layer.k[:, 0]
    queries = [3, 0, 77]
    scores = q[:, :, queries] @ k.mT / q.shape[-1] ** 0.5
    assert torch.allclose(layer.rows(queries, stream="softmax"), scores.softmax(dim=-1))
    weights = F.relu(q[:, :, queries]) @ F.relu(k).mT
    expected = weights / (weights.sum(dim=-1, keepdim=True) + 1e-6 * k.shape[2])
    assert torch.allclose(layer.rows(queries, stream="relu"), expected)


def test_recording_leaves_the_model_as_it_was():
    model = _model("swin, shifted padded windows")
    record(model, _images(model))
    for module in model.modules():
        assert "attend" not in vars(module) and not module._forward_pre_hooks
    with pytest.raises(RuntimeError):
        record(model, torch.zeros(1, 4, *model.img_size, dtype=torch.float64))
    assert not any("attend" in vars(m) for m in model.modules() if isinstance(m, PolaLinearAttention))


def test_only_the_named_layers_are_recorded():
    model = _model("pvt")
    assert list(record(model, _images(model), ["block3.0"]).layers) == ["block3.0"]


def test_what_the_model_does_not_have_is_refused_with_what_it_has():
    model = _model("pvt")
    with pytest.raises(MapError, match="no attention layer 'block9.0', expected some of block1.0, block2.0"):
        record(model, _images(model), ["block9.0"])
    layer = record(model, _images(model)).layers["block2.0"]
    with pytest.raises(MapError, match="block2.0 has no head 2, expected 0 to 1"):
        layer.rows([0], head=2)
    with pytest.raises(MapError, match="no map 'negative', expected one of combined, same, opposite, softmax, relu"):
        layer.rows([0], stream="negative")
    with pytest.raises(MapError, match=r"block2.0 has queries 0 to 31, received \[0, 32\]"):
        layer.rows([0, 32])
    with pytest.raises(MapError, match="relu map has no depthwise branch"):
        layer.rows([0], stream="relu", depthwise=True)


def test_maps_of_a_low_precision_run_are_float32():
    model = PolaPVT(img_size=(32, 32), depths=(1, 1, 1, 1), attn_type="LSLL", **PVT).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layers = record(model, torch.randn(1, 3, 32, 32)).layers
    for layer in layers.values():
        rows = layer.rows([0], depthwise=layer.convolution is not None)
        assert rows.dtype == torch.float32 and rows.isfinite().all()


# ---------------------------------------------------------------------------------------------------------------------
# Overlays
# ---------------------------------------------------------------------------------------------------------------------


def test_painted_map_is_brightest_where_the_weight_is_and_blue_where_it_is_negative():
    pixels = torch.full((3, 32, 32), 128, dtype=torch.uint8)
    weights = torch.zeros(4, 4)
    weights[0, 3], weights[3, 0] = 1.0, -1.0
    painted = np.asarray(paint(ground(pixels), weights)).astype(int)
    assert painted.shape == (32, 32, 3)
    positive, negative, empty = painted[2, 29], painted[29, 2], painted[16, 16]
    assert positive[0] > negative[0] and positive.sum() > 2 * empty.sum()
    assert negative[2] > positive[2] and negative.sum() > 2 * empty.sum()
    assert np.asarray(paint(ground(pixels, (48, 40)), weights)).shape == (40, 48, 3)


def test_overlay_of_a_query_shows_the_mean_row_over_heads_of_the_patch_under_the_pixel():
    model = MODELS["pvt, reduced keys"]().eval()
    pixels = torch.randint(0, 256, (3, 32, 64), dtype=torch.uint8)
    layer = record(model, Normalise(torch.device("cpu"))(pixels[None])).layers["block2.0"]
    row = layer.rows([1 * 8 + 5])[0, :, 0].mean(dim=0).reshape(layer.key_grid)  # a patch has 8×8 pixels
    assert overlay(model, pixels, "block2.0", (40, 8)).tobytes() == paint(ground(pixels), row).tobytes()
    mean = layer.received()[0].mean(dim=0).reshape(layer.key_grid)
    assert overlay(model, pixels, "block2.0").tobytes() == paint(ground(pixels), mean).tobytes()
    with pytest.raises(MapError, match="point 64,8 is outside of the 64×32 image"):
        overlay(model, pixels, query=(64, 8))


@pytest.mark.parametrize("letters, layer", [("LLSS", "block2.0"), ("SSSS", "block4.0"), ("LLLL", "block4.0")])
@pytest.mark.parametrize("kernel", KERNELS)
def test_overlay_takes_the_deepest_linear_layer(letters, layer, kernel):
    model = PolaPVT(img_size=(64, 64), depths=(1, 1, 1, 1), attn_type=letters, attention=kernel, **PVT)
    if kernel == "softmax":
        layer = "block4.0"
    assert last_linear_layer(model) == layer


@pytest.mark.parametrize("kind", [kind for kind, kernel in KERNELS.items() if issubclass(kernel, LinearKernel)])
def test_overlay_takes_the_deepest_layer_of_every_linear_attention(kind):
    model = PolaPVT(img_size=(64, 64), depths=(1, 1, 1, 1), attn_type="LLSS", attention=kind, **PVT)
    assert last_linear_layer(model) == "block2.0"
    assert last_linear_layer(_model("nala, linear and softmax")) == "layers.1.blocks.0"


def test_benchmark_times_no_rows_that_give_other_outputs_than_the_op(monkeypatch):
    model = MODELS["pvt"]().eval()
    layers = record(model, torch.randn(1, 3, 32, 64)).layers
    attention_maps.check_rows(layers)
    rows = LayerRecord.rows
    monkeypatch.setattr(LayerRecord, "rows", lambda *arguments, **named: 1.001 * rows(*arguments, **named))
    with pytest.raises(WrongResultError, match="rows of block1.0 give other outputs"):
        attention_maps.check_rows(layers)
