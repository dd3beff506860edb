"""tools/visualize_attention.py and tools/analyze.py: what their pictures, page and table say.

pytest tests/test_attention_tools.py
"""

import csv
import os
import re
import runpy
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY
from PIL import Image

from config import image_size, load_config
from data.transforms import Normalise, evaluation_transform
from models import build_model
from models.attention_maps import attention_layers, record
from models.kernels import KERNELS
from models.nalaformer import NaLaFormer
from models.pola_pp import PolaPP
from models.pola_swin import PolaSwin
from tools import analyze, visualize_attention
from tools.checkpoints import load_model, read_image
from tools.overlays import ground, key_map, paint

LAYERS = ["layers.0.blocks.0", "layers.1.blocks.0", "layers.2.blocks.0", "layers.3.blocks.0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint of a tiny model, an image, and a file that is none."""
    folder = tmp_path_factory.mktemp("attention")
    (folder / "tiny.yaml").write_text(TINY)
    config = load_config(str(folder / "tiny.yaml"))
    torch.manual_seed(0)
    model = build_model(config, 10)
    for parameter in model.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    contents = {"model": model.state_dict(), "config": config.dump(), "classes": [f"digit {i}" for i in range(10)]}
    torch.save(contents, folder / "checkpoint.pth")
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    (folder / "images" / "more").mkdir(parents=True)
    Image.fromarray(noise).save(folder / "images" / "noise.png")
    Image.fromarray(noise.transpose(1, 0, 2)).save(folder / "images" / "more" / "noise.png")
    (folder / "no_image.jpg").write_text("text")
    return folder


def _recorded(folder: Path):
    loaded = load_model(folder / "checkpoint.pth")
    pixels = read_image(folder / "images" / "noise.png", evaluation_transform(loaded.config, image_size(loaded.config)))
    return pixels, record(loaded.model, Normalise(torch.device("cpu"))(pixels[None])).layers


# ---------------------------------------------------------------------------------------------------------------------
# visualize_attention.py
# ---------------------------------------------------------------------------------------------------------------------


class _Reader(HTMLParser):
    """The pictures of a page, and everything that it would have to fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.alternatives: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag, attributes) -> None:
        values = dict(attributes)
        if tag == "img":
            self.alternatives.append(values["alt"])
        for name in ("src", "href"):
            if not values.get(name, "data:").startswith("data:"):
                self.fetched.append(values[name])


def test_pictures_of_names_that_are_alike_or_too_long_do_not_replace_each_other(folder, tmp_path):
    image = next((folder / "images").rglob("*.png"))
    names = ["a.png", "a-2.png", "a.jpg.png", os.fsdecode(b"\xe9" * 200) + ".png", os.fsdecode(b"\xe9" * 201) + ".png"]
    paths = [tmp_path / place / name for place in ("one", "two") for name in names]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        path.symlink_to(image)
    output = tmp_path / "maps"
    arguments = ["--checkpoint", str(folder / "checkpoint.pth"), "--output", str(output), "--size", "128"]
    assert visualize_attention.main([*map(str, paths), *arguments]) == 0
    assert len(list(output.glob("*.png"))) == len(paths)


def test_page_and_grid_hold_every_layer_map_and_query(folder, capsys):
    output = folder / "visualized"
    assert (
        visualize_attention.main(
            [str(folder / "images"), "--checkpoint", str(folder / "checkpoint.pth"), "--output", str(output)]
        )
        == 0
    )
    # two images of one name in two folders
    assert sorted(path.name for path in output.iterdir()) == ["index.html", "noise-2.png", "noise.png"]
    text = (output / "index.html").read_text()
    reader = _Reader()
    reader.feed(text)
    assert not reader.fetched and "<script" not in text and "url(" not in text
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text
    one_image = ["noise.png with its query points"]
    for layer in LAYERS:
        for name in ("combined", "same", "opposite", "combined + depthwise") if layer < "layers.2" else ("softmax",):
            queries = ["query 1", "query 2", "query 3"] + ["all queries"] * ("+" not in name)
            one_image += [f"{layer}, {name}, mean of heads, {query}" for query in queries]
    assert reader.alternatives == 2 * one_image
    assert len(re.findall(r"digit \d \d+\.\d%", text)) == 2 * 3


def test_png_shows_the_rows_of_the_chosen_layer_head_and_point(folder):
    output = folder / "chosen"
    arguments = "--layers layers.1.blocks.0 --heads 1 --points 9,21 --streams opposite --size 160".split()
    image = str(folder / "images" / "noise.png")
    checkpoint = ["--checkpoint", str(folder / "checkpoint.pth"), "--output", str(output)]
    assert visualize_attention.main([image, *arguments, *checkpoint]) == 0
    pixels, layers = _recorded(folder)
    layer = layers["layers.1.blocks.0"]  # 4×4 tokens of 8×8 pixels: pixel (9, 21) is in row 2, column 1
    grid = np.asarray(Image.open(output / "noise.png").convert("RGB")).astype(int)
    cell = 160
    maps = [
        layer.rows([2 * 4 + 1], head=1, stream="opposite")[0, 0, 0],
        layer.received(head=1, stream="opposite")[0, 0],
    ]
    left, top = 20 + 210, 20 + cell + 40
    for weights in maps:
        expected = paint(ground(pixels, (cell, cell)), key_map(layer, weights))
        found = grid[top : top + cell, left : left + cell]
        differs = (found != np.asarray(expected)).any(axis=-1)
        assert differs.mean() < 0.01  # the query's ring
        left += cell + 8
    assert not differs.any()  # no ring where all queries are averaged


def test_list_names_layers_kinds_and_heads(folder, capsys):
    assert visualize_attention.main(["--checkpoint", str(folder / "checkpoint.pth"), "--list"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [(line[0], line[1], int(line[5])) for line in lines] == [
        (LAYERS[0], "polarity", 0),
        (LAYERS[1], "polarity", 1),
        (LAYERS[2], "softmax", 1),
        (LAYERS[3], "softmax", 3),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# analyze.py
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def analysis(folder) -> Path:
    output = folder / "analysis"
    image = str(folder / "images" / "noise.png")
    assert analyze.main([image, "--checkpoint", str(folder / "checkpoint.pth"), "--output", str(output)]) == 0
    return output


@pytest.fixture(scope="module")
def table(analysis) -> dict[tuple[str, int, str, str], tuple[float, float]]:
    with open(analysis / "analysis.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    found = {(x["layer"], int(x["head"]), x["metric"], x["map"]): (float(x["value"]), float(x["limit"])) for x in lines}
    assert len(found) == len(lines)
    return found


def test_entropy_is_that_of_the_rows(folder, table):
    _, layers = _recorded(folder)
    for layer in layers.values():
        queries = range(layer.grid[0] * layer.grid[1])
        for stream in layer.streams:
            for head in range(layer.num_heads):
                rows = layer.rows(queries, head=head, stream=stream)[0, 0].double().numpy()
                entropies = []
                for row in rows[rows.sum(axis=1) > 0]:
                    share = row[row > 0] / row.sum()
                    entropies.append(-(share * np.log(share)).sum())
                if len(queries) == 1:  # one key: there is no entropy to speak of
                    assert (layer.name, head, "entropy", stream) not in table
                    continue
                value, limit = table[layer.name, head, "entropy", stream]
                assert value == pytest.approx(np.mean(entropies), abs=1e-5)
                assert limit == pytest.approx(np.log(len(queries)))


def test_rank_is_that_of_the_map_with_and_without_the_depthwise_branch(folder, table):
    _, layers = _recorded(folder)
    layer = layers[LAYERS[0]]
    queries = range(64)
    d = layer.v.shape[-1]
    rows = {
        "combined": layer.rows(queries),
        "combined+depthwise": layer.rows(queries, depthwise=True),
        "softmax": layer.rows(queries, stream="softmax"),
        "relu": layer.rows(queries, stream="relu"),
    }
    for name, matrix in rows.items():
        values = np.linalg.svd(matrix[0, 0].double().numpy(), compute_uv=False)
        assert table[LAYERS[0], 0, "rank", name] == ((values > 1e-3 * values[0]).sum(), 64)
        share = values / values.sum()
        effective = np.exp(-(share * np.log(share)).sum())
        assert table[LAYERS[0], 0, "effective rank", name][0] == pytest.approx(effective, rel=1e-3)
    assert table[LAYERS[0], 0, "rank", "combined"][0] <= 2 * d < table[LAYERS[0], 0, "rank", "combined+depthwise"][0]


def test_exponents_and_gate_correlations(folder, table):
    model = load_model(folder / "checkpoint.pth").model
    exponent = model.get_submodule("layers.1.blocks.0.attn").exponent()[1].detach().numpy()
    own = {key[3]: value for key, value in table.items() if key[:3] == (LAYERS[1], 1, "exponent")}
    assert own["mean"] == (pytest.approx(exponent.mean()), 5.0)
    assert own["standard deviation"][0] == pytest.approx(exponent.std())
    assert own["median"][0] == pytest.approx(np.median(exponent))
    assert own["maximum"][0] == pytest.approx(exponent.max())
    _, layers = _recorded(folder)
    gate = layers[LAYERS[1]].g[0, 0, 1].numpy()  # (16, 8)
    same, opposite = gate[:, :4], gate[:, 4:]
    paired = np.corrcoef(same.ravel(), opposite.ravel())[0, 1]
    means = np.corrcoef(same.mean(axis=1), opposite.mean(axis=1))[0, 1]
    assert table[LAYERS[1], 1, "gate", "paired channels"][0] == pytest.approx(paired, abs=1e-5)
    assert table[LAYERS[1], 1, "gate", "token means"][0] == pytest.approx(means, abs=1e-5)
    assert {layer for layer, _, metric, _ in table if metric == "gate"} == set(LAYERS[:2])


def test_spikiness_and_signs_of_turned_features(tmp_path):
    """Of a PolaFormer++: learned rates by stream, and what of the weights is negative."""
    torch.manual_seed(0)
    row = {"embed_dims": (8, 16), "depths": (1, 1), "num_heads": (1, 2), "mlp_ratios": (1, 1), "projection": 8}
    model = PolaPP(**row, layer_init_values=(1, 1), stage_types="LS", img_size=32, num_classes=3).eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.5)
    pixels = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    names = list(attention_layers(model))
    found, gates = analyze.analyze(model, [pixels], names, ["spikiness", "signs", "entropy"])
    table = {(m.layer, m.head, m.metric, m.map): m.value for m in found}
    attention = model.layers[0].blocks[0].attn
    rates = torch.sigmoid(attention.s2[0, 0, 0])
    assert table[names[0], 0, "spikiness", "opposite mean"] == pytest.approx(rates.mean().item())
    assert table[names[0], 0, "spikiness", "opposite maximum"] == pytest.approx(rates.max().item())
    rows = (
        record(model, Normalise(torch.device("cpu"))(pixels[None]))
        .layers[names[0]]
        .rows(range(64), stream="same")[0, 0]
    )
    negative = -rows[rows < 0].sum() / rows.abs().sum()
    assert table[names[0], 0, "negative share", "same"] == pytest.approx(negative.item(), rel=1e-4) and negative > 0.01
    assert table[names[0], 0, "row sum", "same"] == pytest.approx(rows.sum(dim=1).mean().item(), rel=1e-4)
    assert {layer for layer, _, metric, _ in table if metric != "entropy"} == set(names[:1])
    figures = analyze.draw_figures(tmp_path, model, found, gates)
    assert [path.name for path in figures] == ["entropy.png", "signs.png", "spikiness.png"]
    pixels = np.asarray(Image.open(tmp_path / "spikiness.png").convert("RGB")).reshape(-1, 3)
    for stream in ("same", "opposite"):
        colour = [int(analyze.COLOUR[stream][i : i + 2], 16) for i in (1, 3, 5)]
        assert (pixels == colour).all(axis=1).sum() > 20


def test_norms_of_queries_make_exponents_and_rows(tmp_path):
    """Of a NaLaFormer, and of its kernel in windows, where queries are found by their place in the map."""
    torch.manual_seed(0)
    row = {"embed_dims": (8, 16), "depths": (1, 1), "num_heads": (1, 2), "mlp_ratios": (1, 1), "projection": 8}
    pyramid = NaLaFormer(**row, layer_init_values=(1, 1), stage_types="LS", img_size=32, num_classes=3).eval()
    sizes = {"patch_size": 4, "embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4}
    windows = PolaSwin(img_size=32, attn_type="LL", attention="norm_aware", **sizes).eval()
    pixels = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    for model in (pyramid, windows):
        name = next(iter(attention_layers(model)))
        found, seen = analyze.analyze(model, [pixels], [name], ["norm", "gate"])
        assert not seen.gates and {m.metric for m in found} == {"norm"}  # one map for all channels: no halves
        norms, exponents, entropy = seen.norms[name]
        assert norms.shape == exponents.shape == entropy.shape == (1, 64)
        assert (
            torch.allclose(exponents, 3 * (0.5 + torch.tanh(norms))) and 0 < entropy.min() <= entropy.max() <= 1 + 1e-6
        )
        table = {m.map: m.value for m in found}
        assert table["norm"] == pytest.approx(norms.mean().item())
        expected = np.corrcoef(norms[0].numpy(), entropy[0].numpy())[0, 1]
        assert table["correlation of norm and entropy"] == pytest.approx(expected, abs=1e-4)
        layer = record(model, Normalise(torch.device("cpu"))(pixels[None])).layers[name]
        places = {int(place): index for index, place in enumerate(layer.query_places.flatten())}
        q = layer.q[0, :, 0].flatten(0, 1)
        for place in (0, 13, 63):
            assert norms[0, place] == pytest.approx(q[places[place]].norm().item(), rel=1e-5)
        assert [path.name for path in analyze.draw_figures(tmp_path, model, found, seen)] == ["norm.png"]


def test_a_query_without_matching_keys_does_not_count_in_the_correlation(monkeypatch):
    norms, entropy = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([[0.9, 0.7, torch.nan, 0.2]])
    monkeypatch.setattr(analyze, "query_norms", lambda layer, queries: (norms, norms, entropy))
    layer = SimpleNamespace(name="layers.0.blocks.0", kind="norm_aware", num_heads=1)
    *_, last = analyze.OF_IMAGES["norm"](layer, torch.arange(4), 1e-3)
    assert last.map == "correlation of norm and entropy"
    assert last.value == pytest.approx(np.corrcoef([1, 2, 4], [0.9, 0.7, 0.2])[0, 1], abs=1e-6)


@pytest.mark.parametrize("kind", [kind for kind, kernel in KERNELS.items() if not kernel.streams])
def test_the_page_says_what_the_one_map_of_a_kernel_is(tmp_path, folder, kind):
    config = load_config(str(folder / "tiny.yaml"), ["MODEL.LA.ATTENTION", kind])
    torch.save({"model": build_model(config, 10).state_dict(), "config": config.dump()}, tmp_path / "one.pth")
    arguments = [str(folder / "images" / "noise.png"), "--checkpoint", str(tmp_path / "one.pth")]
    assert visualize_attention.main([*arguments, "--output", str(tmp_path / "maps")]) == 0
    page = (tmp_path / "maps" / "index.html").read_text()
    assert f"<li><b>{kind}</b>: " in page and f"{kind} + depthwise" in page


def test_figures_hold_what_they_are_about(analysis):
    colours = {
        "entropy.png": ("combined", "same", "opposite", "softmax", "relu"),
        "rank.png": ("combined", "combined+depthwise", "softmax", "relu"),
        "exponent.png": ("combined",),
        "gate.png": ("paired channels", "token means"),
    }
    for name, maps in colours.items():
        pixels = np.asarray(Image.open(analysis / name).convert("RGB")).reshape(-1, 3)
        for each in maps:
            colour = [int(analyze.COLOUR[each][i : i + 2], 16) for i in (1, 3, 5)]
            assert (pixels == colour).all(axis=1).sum() > 20, (name, each)


def test_no_more_rows_than_asked_for_are_measured_and_images_are_averaged(folder):
    loaded = load_model(folder / "checkpoint.pth")
    transform = evaluation_transform(loaded.config, image_size(loaded.config))
    images = [read_image(path, transform) for path in sorted((folder / "images").rglob("*.png"))]
    both, _ = analyze.analyze(loaded.model, images, LAYERS[:1], ["entropy", "rank"], queries=5)
    apart = [analyze.analyze(loaded.model, [image], LAYERS[:1], ["entropy", "rank"], queries=5)[0] for image in images]
    for mean, first, second in zip(both, *apart, strict=True):
        assert mean.value == pytest.approx((first.value + second.value) / 2)
        assert mean.metric == "entropy" or (mean.limit == 5 and mean.value <= 5)


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tool, arguments, message",
    [
        (
            "visualize",
            "{image} --layers layers.9.blocks.0",
            "no attention layer 'layers.9.blocks.0', expected some of",
        ),
        ("visualize", "{image} --heads 0,1 --layers layers.0.blocks.0", "has no head 1, expected 0 to 0"),
        ("visualize", "{image} --points 40,3", "point 40,3 is outside of the 32×32 image"),
        ("visualize", "{folder}/no_image.jpg", "no_image.jpg: not an image in any format that is read"),
        ("visualize", "{folder}/absent.jpg", "absent.jpg: No such file or directory; name an image file or a folder"),
        ("visualize", "{folder}/empty", "holds no images"),
        ("analyze", "{image} --layers layers.9.blocks.0", "no attention layer 'layers.9.blocks.0', expected some of"),
        (
            "analyze",
            "{image} --layers layers.3.blocks.0 --metrics gate",
            "none of layers.3.blocks.0 has what that describes",
        ),
        ("analyze", "{image} --metrics norm", "norm: none of layers.0.blocks.0, "),
        ("analyze", "{folder}/no_image.jpg", "no_image.jpg: not an image in any format that is read"),
    ],
)
def test_a_mistake_is_answered_in_one_line(folder, capsys, tool, arguments, message):
    (folder / "empty").mkdir(exist_ok=True)
    words = arguments.format(image=folder / "images" / "noise.png", folder=folder).split()
    program = {"visualize": visualize_attention, "analyze": analyze}[tool]
    output = ["--output", str(folder / "mistaken")]
    assert program.main([*words, "--checkpoint", str(folder / "checkpoint.pth"), *output]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize(
    "tool, arguments, message",
    [
        (visualize_attention, "x.png --heads first", "'first': expected mean, all, or numbers such as 0,2"),
        (visualize_attention, "x.png --points 5", "'5' is not a point; expected x,y in pixels"),
        (visualize_attention, "x.png --streams same,negative", "no map 'negative', expected some of combined, same,"),
        (visualize_attention, "x.png --size 64", "'64' is not a whole number from 128 on"),
        (visualize_attention, "", "name at least one IMAGE"),
        (analyze, "--metrics entropy,speed", "no metric 'speed', expected some of entropy, rank, exponent, spikiness"),
        (analyze, "--tolerance 2", "'2' is not a number between 0 and 1"),
        (analyze, "--queries 0", "'0' is not a whole number from 1 on"),
    ],
)
def test_an_option_that_makes_no_sense_names_what_does(tool, arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        tool.main([*arguments.split(), "--checkpoint", "f.pth"])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("tool", ["visualize_attention", "analyze"])
def test_help_has_an_example_and_tools_run_as_files(tool, monkeypatch, capsys):
    path = str(ROOT / "tools" / f"{tool}.py")
    monkeypatch.setattr(sys, "argv", [path, "--help"])
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(path, run_name="__main__")
    assert str(ROOT) in sys.path
    assert f"example: python tools/{tool}.py" in " ".join(capsys.readouterr().out.split())
