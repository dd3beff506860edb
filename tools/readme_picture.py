"""Draw docs/images/polaformer.png, the picture of the README: attention maps of a photograph, and time against tokens.

pip install -r requirements-docs.txt
python -m tools.readme_picture                    trains a small Pola-Swin first, five minutes on one CPU core
python -m tools.readme_picture --model FILE.pth   draws it with the model of an earlier call

The model tells from a crop which of sixteen photographs it was cut from. The photographs come with the packages
scikit-learn and scikit-image; nothing is downloaded. docs/attention_maps.md shows the picture and says what it is of.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import torch
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision import transforms

from data.transforms import Normalise
from models import build_model, load
from models.attention_maps import record
from models.layers import Grid
from tools.command_line import file_path
from tools.overlays import ground, key_map, paint, token_at

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "images" / "polaformer.png"
NORMALISE = Normalise(torch.device("cpu"))
SPEED = sorted((ROOT / "benchmarks" / "results").glob("lra_speed-cpu-*.json"))
PHOTOGRAPHS = {
    "sklearn": "datasets/images: china.jpg flower.jpg",
    "skimage": "data: astronaut.png brick.png camera.png chelsea.png coffee.png coins.png grass.png gravel.png"
    " hubble_deep_field.jpg ihc.png moon.png motorcycle_left.png retina.jpg rocket.jpg",
}
SIZE: Grid = (96, 144)  # height and width that the model sees
SWIN = {"EMBED_DIM": 32, "DEPTHS": [2, 2, 2], "NUM_HEADS": [2, 4, 8], "WINDOW_SIZE": 56}
MODEL = {"TYPE": "pola_swin", "NAME": "photographs", "SWIN": SWIN, "LA": {"ATTN_TYPE": "LLL"}}
CONFIG = {"DATA": {"IMG_SIZE": list(SIZE)}, "MODEL": MODEL}
STEPS, BATCH, TESTED = 900, 16, 40  # batches of training, images in one, batches of the test
SHOWN, LAYER = "flower.jpg", "layers.1.blocks.1"
POINTS = [(72, 50), (20, 20)]  # on the flower and beside it: x, y in pixels of the model's input
COLUMNS = {"same": "same-signed", "opposite": "opposite-signed", "combined": "both"}
LINES = {  # label, colour, the point that the label stands at, and its place beside it
    "softmax (math)": ("softmax, N×N", "#7b7f88", 4096, (-7, 5), "right"),
    "softmax": ("softmax, fused kernel", "#c2571a", 16384, (2, 9), "right"),
    "polarity": ("polarity attention", "#1f5fbf", 8192, (-3, -38), "center"),
}
CROP = transforms.Compose(
    [
        transforms.RandomResizedCrop(SIZE, scale=(0.1, 1), ratio=(1, 2)),
        transforms.RandomHorizontalFlip(),
        transforms.ColorJitter(0.4, 0.4, 0.4, 0.1),
        transforms.RandomGrayscale(0.3),  # so that colour alone does not tell
        transforms.PILToTensor(),
    ]
)


def photographs() -> dict[str, Image.Image]:
    """The photographs by file name, in RGB, at most 400 pixels wide and high."""
    found = {}
    for package, listed in PHOTOGRAPHS.items():
        folder, names = listed.split(": ")
        for name in names.split():
            with (files(package) / folder / name).open("rb") as file:
                found[name] = Image.open(file).convert("RGB")
            found[name].thumbnail((400, 400))
    return found


def crops(pictures: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
    """A batch of random crops, normalised, and the numbers of their photographs."""
    labels = torch.randint(len(pictures), (BATCH,))
    return NORMALISE(torch.stack([CROP(pictures[i]) for i in labels.tolist()])), labels


def train(path: Path) -> None:
    """Train the model, print its accuracy on new crops of the same photographs, and write it to `path`."""
    torch.manual_seed(0)
    pictures = photographs()
    model, images_of = build_model(CONFIG, len(pictures)), list(pictures.values())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, STEPS, pct_start=0.1)
    for step in range(STEPS):
        images, labels = crops(images_of)
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step} of {STEPS}: loss {loss.item():.3f}", flush=True)
    model.eval()
    with torch.inference_mode():
        tests = (crops(images_of) for _ in range(TESTED))
        right = sum(int((model(images).argmax(dim=1) == labels).sum()) for images, labels in tests)
    print(f"{100 * right / (TESTED * BATCH):.1f} % of {TESTED * BATCH} new crops right")
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": model.state_dict(), "config": yaml.safe_dump(CONFIG), "classes": list(pictures)}, path)


def maps(path: Path) -> tuple[Image.Image, list[list[Image.Image]]]:
    """What the model sees of the photograph, and for each query point its map of each column, painted over it."""
    model = load(path)
    fit = transforms.Compose([transforms.Resize(SIZE), transforms.PILToTensor()])
    pixels: Tensor = fit(photographs()[SHOWN])
    layer = record(model, NORMALISE(pixels[None]), [LAYER]).layers[LAYER]
    queries = [token_at(point, (SIZE[1], SIZE[0]), layer.grid) for point in POINTS]
    base = ground(pixels, (3 * SIZE[1], 3 * SIZE[0]))
    rows = {stream: layer.rows(queries, stream=stream)[0].mean(dim=0) for stream in COLUMNS}  # mean over heads
    painted = [[paint(base, key_map(layer, rows[stream][i])) for stream in COLUMNS] for i in range(len(POINTS))]
    return transforms.functional.to_pil_image(pixels).resize(painted[0][0].size, Image.Resampling.BICUBIC), painted


def draw(path: Path) -> None:
    """Draw the picture with the model in `path`."""
    picture, painted = maps(path)
    figure = Figure(figsize=(12.6, 3.5), dpi=115, facecolor="white")
    shape = len(POINTS), 1 + len(COLUMNS)
    grid = figure.add_gridspec(*shape, left=0.008, right=0.69, top=0.905, bottom=0.02, hspace=0.03, wspace=0.03)
    for i, point in enumerate(POINTS):
        for j, shown in enumerate([picture, *painted[i]]):
            axes = figure.add_subplot(grid[i, j])
            axes.imshow(shown, extent=(0, SIZE[1], SIZE[0], 0))
            axes.axis("off")
            for size, width, colour in ((10, 1.2, "black"), (8, 2.2, "white")):
                axes.plot(*point, "o", ms=size, mfc="none", mec=colour, mew=width)
            if i == 0:
                axes.set_title(["a point of an image", *COLUMNS.values()][j], fontsize=14.5)
    draw_speed(figure.add_axes((0.745, 0.155, 0.24, 0.75)))
    figure.savefig(PICTURE)
    Image.open(PICTURE).convert("RGB").save(PICTURE, optimize=True)
    print(f"{PICTURE.relative_to(ROOT)}: {PICTURE.stat().st_size / 1000:.0f} kB")


def draw_speed(axes: Axes) -> None:
    """Seconds of a training step against the number of tokens, from the newest result of benchmarks.lra_speed."""
    lengths = json.loads(SPEED[-1].read_text())["lengths"]
    for name, (label, colour, at, place, side) in LINES.items():
        seen = {each["length"]: each["seconds"][name]["median"] for each in lengths if name in each["seconds"]}
        axes.plot(list(seen), list(seen.values()), "o-", color=colour, linewidth=2, markersize=5)
        axes.annotate(label, (at, seen[at]), place, textcoords="offset points", color=colour, fontsize=13.5, ha=side)
    last = lengths[-1]
    low, high, factor = (*(last["seconds"][name]["median"] for name in ("polarity", "softmax")), last["times_polarity"])
    arrow = {"arrowstyle": "<->", "color": "#444444", "shrinkA": 5, "shrinkB": 5}
    axes.annotate("", (last["length"], low), (last["length"], high), arrowprops=arrow)
    axes.text(
        last["length"] * 0.94, (low * high) ** 0.5, f"{factor['softmax']['median']:.0f}×", fontsize=13.5, ha="right"
    )
    axes.set(xscale="log", yscale="log", xlim=(850, 20000), ylim=(0.03, 40))
    axes.set_title("time of a training step", fontsize=14.5)
    axes.set_xlabel("tokens", fontsize=12, labelpad=1)
    ticks = [each["length"] for each in lengths]
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize=12)
    axes.set_yticks([0.1, 1, 10], ["0.1 s", "1 s", "10 s"], fontsize=12)
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def main(argv: Sequence[str] | None = None) -> int:
    """Train a model unless one is named, then draw."""
    parser = argparse.ArgumentParser(prog="python -m tools.readme_picture", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", metavar="FILE", type=file_path, help="of an earlier call; default: train one")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    path = arguments.model or ROOT / "output" / "readme_picture" / "model.pth"
    if not arguments.model:
        train(path)
    draw(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
