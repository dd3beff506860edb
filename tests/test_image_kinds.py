"""Kinds of images: wide grey levels, orientations, foreign and failing decoders, pipes; alike wherever images are read.

pytest tests/test_image_kinds.py
"""

import io
import os
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import folder_of, run, write_tiny
from PIL import ExifTags, Image, PngImagePlugin
from torchvision.datasets.folder import IMG_EXTENSIONS

from config import image_size, load_config, make_plan
from data.check import run_check
from data.datasets import TrainDataset
from data.loaders import build_loaders
from data.samplers import Draw
from data.sources.base import FORMATS, LARGEST_FILE, UnreadableImage, decode, decode_fast, read_file
from data.transforms import evaluation_transform
from tools.checkpoints import read_image
from tools.predict import main as predict
from tools.prepare_imagenet import Options, prepare
from tools.report import main as report

LEVELS = np.linspace(6425, 64764, 48 * 40).astype(np.uint16).reshape(40, 48)


def saved(image: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def tiff(rows: bytes, bits: int, photometric: int, width: int = 48, height: int = 40, kind: int = 1) -> bytes:
    """A little-endian TIFF of one strip."""
    entries = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1)]
    entries += [(278, height), (279, len(rows)), (339, kind)]
    table = b"".join(struct.pack("<2H2L", tag, 4 if tag == 279 else 3, 1, value) for tag, value in entries)
    return b"II*\0" + struct.pack("<L", 8 + len(rows)) + rows + struct.pack("<H", len(entries)) + table + bytes(4)


def twelve_bits(levels: np.ndarray) -> bytes:
    """Two levels in three bytes."""
    first, second = levels.reshape(-1, 2).astype(np.uint16).T
    return np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=1).astype(np.uint8).tobytes()


PGM = b"P5 48 40 %d\n"
WIDE = {
    "png": (saved(Image.fromarray(LEVELS), "PNG"), LEVELS >> 8),
    "tif": (saved(Image.fromarray(LEVELS), "TIFF"), LEVELS >> 8),
    "tiff": (saved(Image.fromarray(LEVELS.astype(">u2")), "TIFF"), LEVELS >> 8),
    "pgm": (PGM % 65535 + LEVELS.astype(">u2").tobytes(), LEVELS >> 8),
    "10 bits.pgm": (PGM % 1023 + (LEVELS >> 6).astype(">u2").tobytes(), (LEVELS >> 6) / 1023 * 255),
    "12 bits.tif": (tiff(twelve_bits(LEVELS >> 4), 12, 1), LEVELS >> 8),
    "black is 65535.tif": (tiff(LEVELS.tobytes(), 16, 0), 255 - (LEVELS >> 8)),
}
NO_RANGE = {
    "float.tif": saved(Image.fromarray((LEVELS / 65535).astype(np.float32)), "TIFF"),
    "32 bits.tif": saved(Image.fromarray(LEVELS.astype(np.int32)), "TIFF"),
    "signed.tif": tiff(LEVELS.tobytes(), 16, 1, kind=2),
    "float.ppm": b"Pf\n48 40\n-1.0\n" + (LEVELS / 65535).astype(np.float32).tobytes(),
}


@pytest.mark.parametrize(("content", "expected"), WIDE.values(), ids=WIDE)
def test_wide_grey_levels_keep_their_upper_bits(content, expected):
    notes = []
    image = decode(content, "a", notes=notes)
    assert image.mode == "RGB" and notes == ["wide"]
    pixels = np.asarray(image)
    assert (pixels == pixels[..., :1]).all() and np.abs(pixels[..., 0] - expected).max() < 1
    assert torch.equal(decode_fast(content, "a"), torch.from_numpy(pixels.copy()).permute(2, 0, 1))


@pytest.mark.parametrize("content", NO_RANGE.values(), ids=NO_RANGE)
def test_grey_levels_without_a_known_range_are_refused_by_name(content):
    for decoder in (decode, decode_fast):
        with pytest.raises(UnreadableImage, match=r"^x/a.tif: grey levels of 32 bits or signed ones .*8 or 16 bits"):
            decoder(content, "x/a.tif")


def test_narrow_images_are_what_they_were():
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA"):
        image = Image.fromarray((LEVELS >> 8).astype(np.uint8)).convert("RGB").convert(mode)
        notes = []
        read = decode(saved(image, "PNG"), "a", notes=notes)
        assert read.mode == "RGB" and not notes
        assert np.array_equal(np.asarray(read), np.asarray(image.convert("RGB")))


@pytest.fixture
def wide_folder(tmp_path: Path) -> Path:
    """An image folder, 4 training images a class and 1 for validation; class b is of 16-bit grey levels."""
    for split, count in (("train", 4), ("val", 1)):
        for name in ("a", "b"):
            (tmp_path / "set" / split / name).mkdir(parents=True)
            for i in range(count):
                levels = LEVELS - 100 * i - 50 * (split == "val")
                image = Image.fromarray(levels if name == "b" else (levels >> 8).astype(np.uint8))
                image.save(tmp_path / "set" / split / name / f"{i}.png")
    return tmp_path / "set"


SMALL = "DATA.IMG_SIZE 32 DATA.BATCH_SIZE 2 DATA.NUM_WORKERS 0 AUG.AUTO_AUGMENT none AUG.COLOR_JITTER 0.0"


def configured(root: Path, *options: str):
    cfg = write_tiny(root.parent)
    return load_config(str(cfg), f"DATA.DATASET imagenet DATA.DATA_PATH {root} {SMALL}".split() + [*options])


def test_wide_images_are_alike_in_training_evaluation_tools_and_prepared_sets(wide_folder, tmp_path, capsys):
    config = configured(wide_folder)
    built = build_loaders(config, make_plan(config))
    ((images, labels),) = list(built.val)
    assert labels.tolist() == [0, 1]
    assert (images[0].float() - images[1].float()).abs().max() <= 2  # the same picture with 8 and 16 bits
    dataset = built.train.loader.dataset
    assert isinstance(dataset, TrainDataset)
    narrow, wide = dataset[Draw(0, 0)].image, dataset[Draw(0, 4)].image
    assert wide.min() > 20 and wide.max() < 255 and 25 < narrow.float().mean() < 230
    transform = evaluation_transform(config, image_size(config))
    assert torch.equal(read_image(wide_folder / "val" / "b" / "0.png", transform), images[1])
    prepare(wide_folder, tmp_path / "prepared", Options(short_side=20))
    stored = np.asarray(Image.open(tmp_path / "prepared" / "train" / "b" / "0.png.jpg").convert("L"))
    assert stored.min() < 40 and 235 < stored.max() < 255
    assert run_check(config) == 1
    text = capsys.readouterr().out
    assert "WARNING: 5 images have 16-bit grey levels, of which the upper 8 bits are used" in text
    assert f"{wide_folder}/train/b/0.png" in text


# ---------------------------------------------------------------------------------------------------------------------
# Decoders
# ---------------------------------------------------------------------------------------------------------------------

RED = Image.new("RGB", (40, 30), "#c02010")
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 30\n%%EndComments\nshowpage\n"


@pytest.mark.parametrize("form", ["JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "MPO"])
def test_what_the_extensions_promise_is_read(form):
    assert decode(saved(RED, form), "a").getpixel((3, 3)) == pytest.approx((192, 32, 16), abs=3)


@pytest.mark.parametrize("form", ["GIF", "ICO", "AVIF", "EPS", "PDF", "TGA", "JPEG2000"])
def test_other_formats_are_not_read_whatever_they_are_called(form, monkeypatch):
    content = EPS if form == "EPS" else saved(RED, form)
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a decoder started a program"))
    with pytest.raises(UnreadableImage, match=r"^a.jpg: not an image in any format that is read \(JPEG, PNG,"):
        decode(content, "a.jpg")


@pytest.mark.parametrize("error", [RuntimeError("Failed to decode"), AssertionError(), MemoryError(), KeyError("x")])
def test_whatever_a_decoder_raises_is_an_unreadable_image(error, monkeypatch):
    def fail(self):
        raise error

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", fail)
    reason = str(error) or type(error).__name__
    with pytest.raises(UnreadableImage, match=f"^x/a.png: {reason}$"):
        decode(saved(RED, "PNG"), "x/a.png")


def test_damaged_avif_ends_neither_training_nor_the_check(wide_folder, capsys):
    victim = wide_folder / "train" / "a" / "0.png"
    content = saved(RED, "AVIF")
    victim.write_bytes(content[:200] + bytes(60) + content[260:])
    config = configured(wide_folder)
    built = build_loaders(config, make_plan(config))
    built.train.set_epoch(0)
    assert sum(len(labels) for _, labels in built.train) == 8 and len(built.train.unreadable) == 1
    assert run_check(config) == 1 and f"{victim}: not an image" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_pipes_and_devices_are_refused_without_being_opened(wide_folder, kind, capsys):
    victim = wide_folder / "train" / "a" / "pipe.png"
    os.mkfifo(victim) if kind == "pipe" else victim.symlink_to("/dev/zero")
    config = configured(wide_folder)
    built = build_loaders(config, make_plan(config))
    built.train.set_epoch(0)
    assert sum(len(labels) for _, labels in built.train) == 8
    assert built.train.unreadable == {f"{victim}: is no regular file"}
    assert run_check(config) == 1 and f"{victim}: is no regular file" in capsys.readouterr().out


def test_a_file_beyond_all_images_is_refused_unread(tmp_path):
    with (tmp_path / "huge.jpg").open("wb") as file:
        file.truncate(LARGEST_FILE + 1)
    with pytest.raises(UnreadableImage, match=r"huge.jpg: 268,435,457 bytes, expected at most 268,435,456"):
        read_file(tmp_path / "huge.jpg")


# ---------------------------------------------------------------------------------------------------------------------
# EXIF
# ---------------------------------------------------------------------------------------------------------------------

CORNERS = np.zeros((40, 60, 3), dtype=np.uint8)
CORNERS[:20, :30], CORNERS[:20, 30:], CORNERS[20:, :30], CORNERS[20:, 30:] = 10, 90, 170, 240


def turned(orientation: int, form: str = "JPEG") -> bytes:
    """A picture stored such that, turned as its EXIF data say, it is CORNERS."""
    undo = {1: [], 2: [0], 3: [3], 4: [1], 5: [5], 6: [2], 7: [6], 8: [4]}[orientation]
    image = Image.fromarray(CORNERS)
    for method in undo:
        image = image.transpose(Image.Transpose(method))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return saved(image, form, exif=exif, **({"quality": 95, "subsampling": 0} if form == "JPEG" else {}))


def corners(pixels) -> list[int]:
    pixels = np.asarray(pixels)
    pixels = pixels.transpose(1, 2, 0) if pixels.shape[0] == 3 else pixels
    height, width = pixels.shape[:2]
    ys, xs = (height // 4, height * 3 // 4), (width // 4, width * 3 // 4)
    return [round(float(pixels[y, x, 0]), -1) for y in ys for x in xs]


UPRIGHT = [10, 90, 170, 240]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_orientation_is_obeyed_only_where_it_is_asked_for(orientation, form):
    content = turned(orientation, form)
    for decoder in (decode, decode_fast):
        assert corners(decoder(content, "a", exif=True)) == pytest.approx(UPRIGHT, abs=10)
        stored = corners(decoder(content, "a"))
        assert (stored == pytest.approx(UPRIGHT, abs=10)) == (orientation == 1)
    notes: list[str] = []
    decode(content, "a", notes=notes)
    decode(content, "a", exif=True, notes=notes)
    assert notes == ["turned"] * (orientation != 1)


def test_damaged_exif_is_no_reason_to_refuse_an_image():
    content = turned(6).replace(b"II*\0", b"II\xff\xff").replace(b"MM\0*", b"MM\xff\xff")
    for decoder in (decode, decode_fast):
        obeying, plain = (np.asarray(decoder(content, "a", exif=exif)) for exif in (True, False))
        assert np.array_equal(obeying, plain)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            for i in range(4):
                content = turned(6) + bytes([i, name == "a", split == "val"])
                (tmp_path / "photos" / split / name / f"{i}.jpg").write_bytes(content)
    return tmp_path / "photos"


def test_one_key_decides_in_training_evaluation_maps_report_and_prediction(photos, tmp_path, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr("tools.run_report.examples._picture", lambda pixels: seen.append(pixels) or RED)
    for exif in (False, True):
        config = configured(photos, "DATA.EXIF", str(exif), "AUG.HFLIP", "0.0", "DATA.IMG_SIZE", "64")
        built = build_loaders(config, make_plan(config))
        images, _ = next(iter(built.val))
        assert (corners(images[0]) == pytest.approx(UPRIGHT, abs=12)) == exif
        assert (corners(built.train.loader.dataset.source.load(0)) == pytest.approx(UPRIGHT, abs=12)) == exif
        transform = evaluation_transform(config, (64, 64))
        assert torch.equal(read_image(photos / "val" / "a" / "0.jpg", transform, exif=exif), images[0])
        options = f"DATA.DATASET imagenet DATA.DATA_PATH {photos} {SMALL} DATA.IMG_SIZE 64 DATA.EXIF {exif}"
        run(tmp_path / "tiny.yaml", f"{options} TRAIN.EPOCHS 1 TAG exif{exif}")
        folder = folder_of(tmp_path / "tiny.yaml").with_name(f"exif{exif}")
        seen.clear()
        assert report([str(folder)]) == 0 and seen
        assert (corners(seen[0]) == pytest.approx(UPRIGHT, abs=12)) == exif
        capsys.readouterr()
        checkpoint, results = ["--checkpoint", str(folder / "max_acc.pth"), "--format", "json"], {}
        for switch in ([], ["--exif"], ["--no-exif"]):
            assert predict([*checkpoint, str(photos / "val" / "a"), *switch]) == 0
            output = capsys.readouterr()
            results[tuple(switch)] = output.out
            applied = switch == ["--exif"] or (exif and not switch)
            told = "4 images carry a rotation in their EXIF data that was not applied"
            assert (output.err.count(told) == 1) != applied
        assert results[()] == results[("--exif",) if exif else ("--no-exif",)]
        assert results[("--exif",)] != results[("--no-exif",)]


def test_preparing_keeps_the_orientation_and_the_check_counts_it(photos, tmp_path, capsys):
    prepare(photos, tmp_path / "prepared", Options(short_side=24))
    content = (tmp_path / "prepared" / "train" / "a" / "0.jpg").read_bytes()
    assert min(Image.open(io.BytesIO(content)).size) == 24
    assert corners(decode(content, "a", exif=True)) == pytest.approx(UPRIGHT, abs=12)
    run_check(configured(photos))
    assert "16 images carry an orientation in EXIF, which DATA.EXIF True obeys" in capsys.readouterr().out


def test_every_extension_of_an_image_has_its_decoder():
    known = Image.registered_extensions()
    assert {known[extension] for extension in IMG_EXTENSIONS} == set(FORMATS)
