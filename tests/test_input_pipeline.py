"""The fast path of the input pipeline is the exact one up to the rounding of a resize, and no index grows with objects.

pytest tests/test_input_pipeline.py
"""

import io
import os
import pickle
import random
import tracemalloc
import zipfile
from array import array
from collections import Counter
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from conftest import config_file
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data import create_transform
from torchvision.datasets import ImageFolder

import data.loaders
import data.sources.base
import data.sources.folder
from benchmarks.input_pipeline import IMAGENET, make_zip
from config import image_size, load_config, make_plan
from data.datasets import Sample, SampleRandomness, TrainDataset
from data.loaders import DataError, build_loaders
from data.samplers import Draw
from data.sources.base import UnreadableImage, decode, decode_fast
from data.sources.folder import FolderSource
from data.sources.zip import ZipSource
from data.sources.zip_index import PackedNames, ZipError, ZipIndex
from data.transforms import repair_posterize, training_transform

PHOTOGRAPH = Image.fromarray(load_sample_images().images[0]).resize((250, 188), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", **parameters: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **parameters)
    return buffer.getvalue()


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An image folder of crops of a photograph: 2 classes, 8 training and 2 validation images each."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 2)):
        for name in ("ant", "bee"):
            (tmp_path / "set" / split / name).mkdir(parents=True)
            for i in range(count):
                left, top = generator.integers(0, 80, 2).tolist()
                crop = PHOTOGRAPH.crop((left, top, left + 160, top + 100))
                (tmp_path / "set" / split / name / f"{i}.jpg").write_bytes(encoded(crop, quality=95))
    return tmp_path / "set"


def loaders(root: Path, *options: str, train: bool = True) -> data.loaders.Loaders:
    fixed = f"DATA.DATA_PATH {root} DATA.IMG_SIZE 64 DATA.BATCH_SIZE 4 DATA.NUM_WORKERS 0".split()
    fixed += ["TRAIN.GLOBAL_BATCH", "null"]
    config = load_config(config_file("pola_swin_t"), [*fixed, *options])
    return build_loaders(config, make_plan(config), train=train)


# ---------------------------------------------------------------------------------------------------------------------
# Decoding
# ---------------------------------------------------------------------------------------------------------------------

EXIF = Image.Exif()
EXIF[0x112] = 6  # on its side

JPEGS = {
    "4:4:4": encoded(PHOTOGRAPH, subsampling=0),
    "4:2:2": encoded(PHOTOGRAPH, subsampling=1, quality=95),
    "4:2:0": encoded(PHOTOGRAPH, subsampling=2, quality=40),
    "progressive": encoded(PHOTOGRAPH, progressive=True),
    "grey": encoded(PHOTOGRAPH.convert("L")),
    "RGB": encoded(PHOTOGRAPH, keep_rgb=True),
    "odd size": encoded(PHOTOGRAPH.resize((17, 33))),
    "one pixel": encoded(PHOTOGRAPH.resize((1, 1))),
    "rotated by EXIF": encoded(PHOTOGRAPH, exif=EXIF),
    "bytes after the end": encoded(PHOTOGRAPH) + b"more" * 100,
}


@pytest.mark.parametrize("content", JPEGS.values(), ids=JPEGS.keys())
def test_fast_decoding_gives_the_pixels_of_pillow(content, monkeypatch):
    expected = pixels(decode(content, "a.jpg"))
    monkeypatch.setattr(data.sources.base, "decode", lambda *_: pytest.fail("left to Pillow"))
    tensor = decode_fast(content, "a.jpg")
    assert tensor.dtype == torch.uint8 and torch.equal(tensor, expected)


def _with_zeros(content: bytes) -> bytes:
    """Damaged in the middle, so that Pillow decodes it and simplejpeg refuses."""
    middle = len(content) // 2
    return content[:middle] + bytes(64) + content[middle + 64 :]


OTHERS = {
    "CMYK": encoded(PHOTOGRAPH.convert("CMYK")),
    "PNG": encoded(PHOTOGRAPH, "PNG"),
    "PNG with alpha": encoded(PHOTOGRAPH.convert("RGBA"), "PNG"),
    "TIFF": encoded(PHOTOGRAPH, "TIFF"),
    "damaged": _with_zeros(encoded(PHOTOGRAPH, quality=95)),
}


@pytest.mark.parametrize("content", OTHERS.values(), ids=OTHERS.keys())
def test_what_simplejpeg_cannot_do_is_left_to_pillow(content, monkeypatch):
    asked = []
    monkeypatch.setattr(
        data.sources.base, "decode", lambda content, name, **options: asked.append(name) or decode(content, name)
    )
    assert torch.equal(decode_fast(content, "a.file"), pixels(decode(content, "a.file")))
    assert asked == ["a.file"]


BROKEN = {
    "truncated": encoded(PHOTOGRAPH)[:2000],
    "without its end": encoded(PHOTOGRAPH)[:-10],
    "empty": b"",
    "text": b"not an image" * 20,
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN.keys())
def test_both_decoders_find_the_same_files_unreadable(content):
    messages = []
    for decoder in (decode, decode_fast):
        with pytest.raises(UnreadableImage, match=r"^ant/0.jpg: ") as caught:
            decoder(content, "ant/0.jpg")
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_pillow_judges_huge_images(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", PHOTOGRAPH.width * PHOTOGRAPH.height // 3)
    with pytest.raises(UnreadableImage, match="decompression bomb"):
        decode_fast(JPEGS["4:4:4"], "a.jpg")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert decode_fast(JPEGS["4:4:4"], "a.jpg").shape == (3, PHOTOGRAPH.height, PHOTOGRAPH.width)


def test_a_decoder_that_is_not_installed_is_named_with_its_remedy(folder, monkeypatch):
    monkeypatch.setattr(data.sources.base, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="DATA.DECODER is simplejpeg, which is not installed; `pip install simplejpeg`"):
        loaders(folder, "DATA.DECODER", "simplejpeg")
    assert loaders(folder, "DATA.DECODER", "simplejpeg", train=False).val.num_images == 4  # evaluation needs none


@pytest.mark.parametrize("workers", ["0", "2"])
def test_truncated_image_is_named_and_replaced(folder, workers, caplog):
    victim = folder / "train" / "bee" / "3.jpg"
    victim.write_bytes(victim.read_bytes()[:400])
    built = loaders(folder, "DATA.DECODER", "simplejpeg", "DATA.NUM_WORKERS", workers)
    built.train.set_epoch(0)
    labels = torch.cat([labels for _, labels in built.train])
    assert Counter(labels.tolist()) == {0: 8, 1: 8} and len(built.train.unreadable) == 1
    assert caplog.text.count(str(victim)) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Transforms
# ---------------------------------------------------------------------------------------------------------------------


def both_transforms(*options: str) -> list:
    return [
        training_transform(load_config(config_file("pola_swin_t"), ["DATA.DECODER", decoder, *options]), (224, 224))
        for decoder in ("pillow", "simplejpeg")
    ]


def generator_states() -> tuple:
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


@pytest.mark.parametrize(
    "options",
    ["", "AUG.HFLIP 0.0", "DATA.INTERPOLATION bilinear", "DATA.INTERPOLATION nearest"]
    + [f"AUG.AUTO_AUGMENT {policy}" for policy in ("none", "augmix-m3", "3a", "original")],
)
def test_both_decoders_draw_the_same_random_numbers(options, monkeypatch):
    crop_type = type(both_transforms()[0].transforms[0])
    real_get_params, drawn = crop_type.get_params, []

    def recorded(*arguments):
        drawn.append(real_get_params(*arguments))
        return drawn[-1]

    monkeypatch.setattr(crop_type, "get_params", staticmethod(recorded))
    exact, fast = both_transforms(*options.split())
    for position in range(20):
        ends = []
        for transform, image in ((exact, PHOTOGRAPH), (fast, pixels(PHOTOGRAPH))):
            with SampleRandomness(0, Draw(3, position)):
                result = transform(image)
                ends.append(generator_states())
            assert result.shape == (3, 224, 224) and result.dtype == torch.uint8
        assert ends[0] == ends[1]
    assert drawn[::2] == drawn[1::2] and len(set(drawn)) == 20


@pytest.mark.parametrize(
    ("interpolation", "mean", "largest"), [("bicubic", 0.01, 2), ("bilinear", 0.01, 1), ("nearest", 0, 0)]
)
def test_only_the_rounding_of_the_resize_differs(interpolation, mean, largest):
    if mean and int(PIL.__version__.partition(".")[0]) < 13:
        pytest.skip(f"the order in which Pillow {PIL.__version__} resizes height and width was not measured")
    exact, fast = both_transforms("AUG.AUTO_AUGMENT", "none", "DATA.INTERPOLATION", interpolation)
    # black and white, so that filters overshoot everywhere; larger than the crops, so that both sides grow and shrink
    noise = Image.fromarray(255 * np.random.default_rng(0).integers(0, 2, (400, 500, 3), dtype=np.uint8))
    differences = []
    for position in range(40):
        results = []
        for transform, image in ((exact, noise), (fast, pixels(noise))):
            with SampleRandomness(0, Draw(0, position)):
                for step in transform.transforms[:2]:  # crop and flip
                    image = step(image)
            results.append(image if isinstance(image, torch.Tensor) else pixels(image))
        differences.append((results[0].int() - results[1].int()).abs())
    difference = torch.stack(differences)
    assert difference.double().mean() <= mean and difference.max() <= largest
    if mean:
        assert difference.any()  # so it was another resize


def test_whole_batches_of_both_decoders_agree(folder):
    def batches(decoder):
        built = loaders(folder, "DATA.DECODER", decoder, "DATA.IMG_SIZE", "224")
        built.train.set_epoch(2)
        return zip(*built.train, strict=True)

    (images, labels), (expected, expected_labels) = batches("simplejpeg"), batches("pillow")
    images, expected = torch.cat(images), torch.cat(expected)
    assert torch.equal(torch.cat(labels), torch.cat(expected_labels))
    assert 0 < (images.int() - expected.int()).abs().double().mean() < 0.5


def test_small_images_are_the_same_with_both_decoders(tmp_path):
    for split in ("train", "val"):
        (tmp_path / split / "ant").mkdir(parents=True)
        for i in range(4):
            small = PHOTOGRAPH.crop((40 * i, 0, 40 * i + 32, 32))
            (tmp_path / split / "ant" / f"{i}.jpg").write_bytes(encoded(small))
    options = "DATA.IMG_SIZE 32 DATA.DECODER".split()
    exact, fast = (next(iter(loaders(tmp_path, *options, decoder).train))[0] for decoder in ("pillow", "simplejpeg"))
    assert torch.equal(fast, exact)


def test_bundled_digits_work_with_either_decoder():
    exact, fast = (
        build_loaders(config, make_plan(config)).train
        for config in (
            load_config(config_file("quickstart"), f"DATA.DECODER {decoder} DATA.NUM_WORKERS 0".split())
            for decoder in ("pillow", "simplejpeg")
        )
    )
    assert torch.equal(next(iter(fast))[0], next(iter(exact))[0])


def test_pillow_pixels_are_those_of_timms_recipe():
    config = load_config(config_file("pola_swin_t"))
    recipe = create_transform(
        (224, 224),
        is_training=True,
        use_prefetcher=True,
        hflip=0.5,
        color_jitter=0.4,
        auto_augment="rand-m9-mstd0.5-inc1",
        interpolation="bicubic",
    )
    repair_posterize(recipe.transforms)
    ours = training_transform(config, image_size(config))
    for position in range(30):
        with SampleRandomness(0, Draw(0, position)):
            expected = torch.as_tensor(recipe(PHOTOGRAPH))
        with SampleRandomness(0, Draw(0, position)):
            assert torch.equal(ours(PHOTOGRAPH), expected)


def test_evaluation_is_exact_whatever_decodes_the_training_images(folder, monkeypatch):
    exact = list(loaders(folder).val)
    monkeypatch.setattr(data.sources.base, "decode_fast", lambda *_: pytest.fail("used in evaluation"))
    for train in (True, False):
        for (images, labels), (expected, expected_labels) in zip(
            loaders(folder, "DATA.DECODER", "simplejpeg", train=train).val, exact, strict=True
        ):
            assert torch.equal(images, expected) and torch.equal(labels, expected_labels)


# ---------------------------------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoder", ["pillow", "simplejpeg"])
def test_workers_write_batches_into_shared_memory_once(folder, decoder):
    def batches(workers):
        built = loaders(folder, "DATA.NUM_WORKERS", workers, "DATA.DECODER", decoder)
        built.train.set_epoch(0)
        return list(built.train)

    for (images, labels), (expected, expected_labels) in zip(batches("2"), batches("0"), strict=True):
        assert images.is_shared() and images.is_contiguous() and not expected.is_shared()
        assert torch.equal(images, expected) and torch.equal(labels, expected_labels)


def test_a_worker_collates_into_memory_that_is_shared_already(monkeypatch):
    """Otherwise the batch would be copied there when it is sent."""
    samples = [Sample(pixels(PHOTOGRAPH), 0)] * 2
    assert not data.loaders._collate(samples)[0].is_shared()
    monkeypatch.setattr(torch.utils.data, "get_worker_info", lambda: object())
    assert data.loaders._collate(samples)[0].is_shared()


def test_loader_keys_reach_the_loaders(folder):
    built = loaders(folder, *"DATA.NUM_WORKERS 2 DATA.PREFETCH_FACTOR 5".split())
    for batches in (built.train, built.val):  # validation comes again after every epoch
        assert batches.loader.persistent_workers and batches.loader.prefetch_factor == 5
        assert batches.loader.num_workers == 2
    alone = loaders(folder, "DATA.NUM_WORKERS", "2", train=False).val.loader
    assert not alone.persistent_workers and alone.prefetch_factor == 2
    assert not loaders(folder).train.loader.persistent_workers  # without workers there is nothing to keep


@pytest.mark.parametrize(("option", "expected"), [("True", True), ("False", False)])
def test_batches_are_pinned_where_there_is_a_gpu(folder, option, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    built = loaders(folder, "DATA.PIN_MEMORY", option)
    assert built.train.loader.pin_memory is built.val.loader.pin_memory is expected


def test_validation_workers_are_started_once(folder):
    val = loaders(folder, "DATA.NUM_WORKERS", "1").val
    first = [images for images, _ in val]
    processes = [worker.pid for worker in val.loader._iterator._workers]
    assert all(map(torch.equal, first, [images for images, _ in val]))
    assert [worker.pid for worker in val.loader._iterator._workers] == processes


def test_a_batch_equals_its_samples_one_by_one_and_keeps_the_generators(folder):
    config = load_config(config_file("pola_swin_t"), ["DATA.IMG_SIZE", "64"])
    dataset = TrainDataset(
        FolderSource(folder / "train"), training_transform(config, image_size(config)), seed=0, max_unreadable=0
    )
    draws = [Draw(1, position) for position in (3, 0, 7)]
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    before = generator_states()
    samples = dataset.__getitems__(draws)
    assert generator_states() == before
    for sample, draw in zip(samples, draws, strict=True):
        assert torch.equal(sample.image, dataset[draw].image) and sample.label == dataset[draw].label
    Path(dataset.source.name(0)).write_bytes(b"")
    with pytest.raises(DataError, match="1 of 16 training images are unreadable"):
        dataset.__getitems__(draws)
    assert generator_states() == before


# ---------------------------------------------------------------------------------------------------------------------
# Index of names
# ---------------------------------------------------------------------------------------------------------------------


def test_packed_names_give_back_what_they_were_given():
    names = [b"", b"ant/0.jpg", "grüße/雪.png".encode(), b"\xff\xfe", b"", b"a\nb"]
    packed = PackedNames(iter(names))
    assert list(packed) == names and [packed[i] for i in range(len(names))] == names
    assert list(pickle.loads(pickle.dumps(packed))) == names
    with pytest.raises(IndexError):
        packed[len(names)]
    assert list(PackedNames([])) == []
    assert packed.nbytes == sum(map(len, names)) + len(names)  # one byte each is enough for ends up to 255


def test_folder_lists_the_files_that_torchvision_lists_in_its_order(folder):
    root = folder / "train"
    (root / "ant" / "deeper" / "still").mkdir(parents=True)
    for name in ("Z.JPEG", "a.PNG", "notes.txt", "deeper/9.jpg", "deeper/still/1.jpg", "grüße 雪.jpg"):
        (root / "ant" / name).write_bytes(encoded(PHOTOGRAPH.resize((8, 8))))
    strange = os.fsencode(root / "bee") + b"/\xff.jpg"  # no valid UTF-8
    with open(strange, "wb") as file:
        file.write(encoded(PHOTOGRAPH.resize((8, 8))))
    source, expected = FolderSource(root), ImageFolder(str(root))
    assert [(source.path(i), int(source.labels[i])) for i in range(len(source.labels))] == expected.samples
    for i in range(len(source.labels)):
        assert torch.equal(pixels(source.load(i)), pixels(expected[i][0]))


def traced_bytes(make) -> tuple[object, int]:
    """What `make` returned and how much memory it holds."""
    tracemalloc.start()
    try:
        made = make()
        return made, tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()


def test_index_of_a_folder_is_names_and_eight_bytes(tmp_path, monkeypatch):
    count = 20_000
    (tmp_path / "n01440764").mkdir()
    names = [f"n01440764_{i:05d}.JPEG" for i in range(count)]
    listed = [str(tmp_path / "n01440764" / name) for name in names]
    monkeypatch.setattr(data.sources.folder.Listing, "images", lambda *_: iter(listed))  # not so many real files
    source, held = traced_bytes(lambda: FolderSource(tmp_path))
    length = len("n01440764/" + names[0])
    assert held / count < length + 4 + 4 + 1
    assert held / count * IMAGENET < 60 * 2**20
    assert source.name(count - 1) == listed[-1]


def private_pages(function) -> int:
    """Bytes of pages that a forked process has to copy while it calls `function`."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:

        def private() -> int:
            fields = dict(line.split(":") for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
            return 1024 * int(fields["Private_Dirty"].split()[0])

        before = private()
        function()
        os.write(writer, str(private() - before).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writer)
    with open(reader) as file:
        return int(file.read())


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux, which counts private pages")
def test_reading_names_and_labels_copies_no_page_of_a_forked_worker():
    names = [f"n01440764/n01440764_{i:06d}.JPEG" for i in range(200_000)]
    packed, labels = PackedNames(name.encode() for name in names), np.arange(len(names), dtype=np.int32)

    def read_packed():
        for name, label in zip(packed, labels, strict=True):
            assert name and label >= 0

    def read_list():
        for name in names:
            assert name

    assert private_pages(read_list) > 8 * 2**20  # what lists of strings would cost: nearly all of them
    assert private_pages(read_packed) < 2**20


# ---------------------------------------------------------------------------------------------------------------------
# Zip
# ---------------------------------------------------------------------------------------------------------------------

CONTENT = {"ant/0.jpg": b"first" * 100, "bee/leer": b"", "grüße/雪.jpg": bytes(range(256)), "x": b"last" * 1000}


def write_zip(file, method: int = zipfile.ZIP_STORED, comment: bytes = b"") -> None:
    with zipfile.ZipFile(file, "w", method) as archive:
        archive.comment = comment
        archive.mkdir("folder")
        for name, content in CONTENT.items():
            archive.writestr(name, content)


class Stream(io.RawIOBase):
    """A pipe-like file: what is written to it cannot be revisited, so that sizes follow the data."""

    def __init__(self, file) -> None:
        self.file = file

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:
        return self.file.write(data)


def _stored(path: Path) -> None:
    write_zip(path)


def _deflated(path: Path) -> None:
    write_zip(path, zipfile.ZIP_DEFLATED)


def _commented(path: Path) -> None:
    write_zip(path, comment=b"comment " * 1000)


def _behind_something(path: Path) -> None:
    write_zip(path)
    path.write_bytes(b"#!/bin/sh\n" * 7 + path.read_bytes())


def _streamed(path: Path) -> None:
    with path.open("wb") as file:
        write_zip(Stream(file), zipfile.ZIP_DEFLATED)


def _beyond_four_gibibytes(path: Path) -> None:
    with path.open("wb") as file:
        file.seek(2**32 + 4096)  # a hole, which takes no space
        write_zip(file)


def _in_cp437(path: Path) -> None:
    write_zip(path)
    raw = path.read_bytes()  # the name's bytes stay, the flag that calls them UTF-8 goes
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        position = raw.find(signature)
        while position >= 0:
            raw = raw[: position + flags] + b"\0\0" + raw[position + flags + 2 :]
            position = raw.find(signature, position + 1)
    path.write_bytes(raw)


@pytest.mark.parametrize(
    "write", [_stored, _deflated, _commented, _behind_something, _streamed, _beyond_four_gibibytes, _in_cp437]
)
def test_zip_index_reads_what_the_standard_library_reads(tmp_path, write):
    path = tmp_path / "a.zip"
    write(path)
    index = ZipIndex.of(path)
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        expected = {name.encode(): archive.read(name) for name in archive.namelist()}
        assert list(index.names) == list(expected) and len(expected) == 5
        for position, content in enumerate(expected.values()):
            assert index.read(file.fileno(), position) == content


def test_more_files_than_sixteen_bits_count(tmp_path):
    path = tmp_path / "many.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(65_600):
            archive.writestr(str(i), b"")
    assert list(ZipIndex.of(path).names) == [str(i).encode() for i in range(65_600)]


def test_files_are_found_in_any_order(tmp_path):
    _stored(tmp_path / "a.zip")
    index = ZipIndex.of(tmp_path / "a.zip")
    names = list(index.names)
    assert [index.find(name) for name in names] == [0, 1, 2, 3, 4]
    index = ZipIndex.of(tmp_path / "a.zip")
    assert [index.find(name) for name in (names[0], names[3], names[1], b"strange")] == [0, 3, 1, None]
    some = index.take(array("q", [3, 1]))
    assert list(some.names) == [names[3], names[1]]
    with (tmp_path / "a.zip").open("rb") as file:
        assert some.read(file.fileno(), 0) == CONTENT["grüße/雪.jpg"]


def _replace(path: Path, position: int, new: bytes) -> None:
    raw = bytearray(path.read_bytes())
    raw[position : position + len(new)] = new
    path.write_bytes(raw)


def _encrypt(path: Path) -> None:
    raw = path.read_bytes()
    _replace(path, raw.find(b"PK\x01\x02") + 8, b"\x01")


DAMAGED = {
    "no zip": (lambda path: path.write_bytes(b"text" * 100), "does not end as a zip file does"),
    "empty": (lambda path: path.write_bytes(b""), "does not end as a zip file does"),
    "cut off": (lambda path: path.write_bytes(path.read_bytes()[:-40]), "does not end as a zip file does"),
    "without its beginning": (lambda path: path.write_bytes(path.read_bytes()[-200:]), "does not fit into the file"),
    "directory": (lambda path: _replace(path, path.read_bytes().rfind(b"PK\x01\x02"), b"XX"), "an entry of its dir"),
    "encrypted": (_encrypt, "is encrypted"),
    "method": (lambda path: write_zip(path, zipfile.ZIP_BZIP2), r"has compression method 12, expected 0 \(stored\) or"),
}


@pytest.mark.parametrize(("spoil", "message"), DAMAGED.values(), ids=DAMAGED.keys())
def test_a_zip_that_cannot_be_used_says_why(tmp_path, spoil, message):
    _stored(tmp_path / "train.zip")
    spoil(tmp_path / "train.zip")
    with pytest.raises(ZipError, match=message):
        ZipIndex.of(tmp_path / "train.zip")
    (tmp_path / "train_map.txt").write_text("ant/0.jpg\t0\n")
    with pytest.raises(DataError, match=f"train.zip is not a readable zip file: .*{message}"):
        ZipSource(tmp_path / "train.zip", tmp_path / "train_map.txt")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path, start: _replace(path, start + 60, b"\0\0\0"), "checksum"),
        (lambda path, start: _replace(path, start, b"XX"), "no file starts where"),
        (lambda path, start: path.write_bytes(path.read_bytes()[: start + 40]), "checksum"),
        (lambda path, start: path.write_bytes(b""), "no file starts where"),
    ],
    ids=["bit rot", "header", "cut while open", "emptied while open"],
)
def test_damage_inside_a_zip_is_one_unreadable_image(tmp_path, spoil, message):
    zip_path, map_path = make_zip(tmp_path, 3)
    source = ZipSource(zip_path, map_path)
    spoil(zip_path, int(source._index.members["offset"][1]))
    with pytest.raises(UnreadableImage, match=f"train.zip:n10000000/n10000000_00001.JPEG: .*{message}"):
        source.load(1)


def test_zip_reader_keeps_names_and_a_few_bytes_and_nothing_per_image_read(tmp_path):
    count = 5000
    zip_path, map_path = make_zip(tmp_path, count)
    source, held = traced_bytes(lambda: ZipSource(zip_path, map_path))
    assert source.index_bytes <= held < source.index_bytes + 20_000
    assert held / count * IMAGENET < 150 * 2**20
    kept = []
    tracemalloc.start()
    try:
        for i in range(count):
            source.load(i)
            if i + 1 in (500, count):  # whatever is made once exists after 500
                kept.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert kept[1] - kept[0] < count - 500  # not a byte each
