"""Data: sources, transforms, samplers, and what unreadable or badly laid out data is answered with.

pytest tests/test_data.py
"""

import io
import itertools
import os
import random
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REFERENCE, config_file, jpeg
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images
from torchvision import transforms

from config import image_size, load_config, make_plan
from data.datasets import SampleRandomness, TrainDataset
from data.loaders import DataError, Loaders, build_loaders
from data.samplers import Draw, EvalSampler, TrainSampler
from data.sources.base import UnreadableImage
from data.sources.bundled import DigitsSource
from data.sources.zip import ZipSource, warm_page_cache
from data.transforms import Normalise, TrainBatch, _augment_operations, evaluation_transform, training_transform


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An image folder: 3 classes, 8 training and 3 validation images each."""
    root = tmp_path / "set"
    for split, count in (("train", 8), ("val", 3)):
        for label, name in enumerate(["ant", "bee", "cat"]):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                (root / split / name / f"{i}.jpg").write_bytes(jpeg(100 * label + i))
    return root


def loaders(root: Path, *options: str, train: bool = True) -> Loaders:
    fixed = f"DATA.DATA_PATH {root} DATA.IMG_SIZE 64 DATA.BATCH_SIZE 4 DATA.NUM_WORKERS 0".split()
    fixed += ["TRAIN.GLOBAL_BATCH", "null"]
    config = load_config(config_file("pola_swin_t"), [*fixed, *options])
    return build_loaders(config, make_plan(config), train=train)


# ---------------------------------------------------------------------------------------------------------------------
# Image folder
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", ["0", "2"])
def test_image_folder_yields_uint8_batches_and_its_classes(folder, workers):
    built = loaders(folder, "DATA.NUM_WORKERS", workers)
    assert built.classes == ("ant", "bee", "cat") and built.num_classes == 3
    built.train.set_epoch(0)
    batches = list(built.train)
    assert len(batches) == len(built.train) == 6
    for images, labels in batches:
        assert images.dtype == torch.uint8 and images.shape == (4, 3, 64, 64)
        assert labels.dtype == torch.int64
    assert Counter(torch.cat([labels for _, labels in batches]).tolist()) == {0: 8, 1: 8, 2: 8}
    labels = torch.cat([labels for _, labels in built.val])
    assert labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3  # every image once, the odd last batch included


def test_evaluation_needs_only_val(folder):
    os.rename(folder / "train", folder / "elsewhere")
    built = loaders(folder, train=False)
    assert built.train is None and built.val.num_images == 9 and built.classes == ("ant", "bee", "cat")


def test_validation_labels_are_those_of_training_when_val_lacks_a_class(folder):
    for file in (folder / "val" / "ant").iterdir():
        file.unlink()
    (folder / "val" / "ant").rmdir()
    labels = torch.cat([labels for _, labels in loaders(folder).val])
    assert labels.tolist() == [1] * 3 + [2] * 3


def _flatten_val(root: Path) -> None:
    for file in list((root / "val").glob("*/*.jpg")):
        file.rename(root / "val" / f"{file.parent.name}_{file.name}")
    for name in ("ant", "bee", "cat"):
        (root / "val" / name).rmdir()


def _empty_val(root: Path) -> None:
    _flatten_val(root)
    for file in (root / "val").iterdir():
        file.unlink()


def _empty_class(root: Path) -> None:
    for file in (root / "train" / "bee").iterdir():
        file.unlink()


BAD_LAYOUTS = {
    "absent": (lambda root: os.rename(root, f"{root}-gone"), r"data set folder .*set does not exist; --data-path"),
    "no val": (lambda root: os.rename(root / "val", root / "valid"), r"data set folder .*set/val does not exist"),
    "empty": (_empty_val, r"set/val is empty; expected"),
    "flat val": (_flatten_val, r"set/val holds 9 images but no class folders; expected .*/val/<class>/<image>"),
    "unknown class": (lambda root: (root / "val" / "dog").mkdir(), r"1 class folders that the training set lacks: dog"),
    "class without images": (_empty_class, r"1 class folders hold no image \(bee\)"),
}


@pytest.mark.parametrize(("spoil", "message"), BAD_LAYOUTS.values(), ids=BAD_LAYOUTS.keys())
def test_bad_layout_is_explained(folder, spoil, message):
    spoil(folder)
    with pytest.raises(DataError, match=message):
        loaders(folder)


def test_settings_that_cannot_work_are_explained(folder):
    config = load_config(config_file("pola_swin_t"))
    with pytest.raises(DataError, match="--data-path names the folder"):
        build_loaders(config, make_plan(config))
    with pytest.raises(DataError, match=r"24 training images on 1 processes are less than one step of 1 × 32 images"):
        loaders(folder, "DATA.BATCH_SIZE", "32")
    with pytest.raises(DataError, match="deliver 3 channels, MODEL.SWIN.IN_CHANS is 1"):
        loaders(folder, "MODEL.SWIN.IN_CHANS", "1")


# ---------------------------------------------------------------------------------------------------------------------
# Unreadable images
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "vanished"])
def test_unreadable_training_image_is_named_counted_and_replaced(folder, workers, damage, caplog):
    victim = folder / "train" / "bee" / "3.jpg"
    built = loaders(folder, "DATA.NUM_WORKERS", workers, "DATA.MAX_UNREADABLE", "0.05")
    content = {"truncated": victim.read_bytes()[:400], "empty": b"", "text": b"not an image" * 20}
    if damage == "vanished":
        victim.unlink()
    else:
        victim.write_bytes(content[damage])
    for epoch in range(2):
        built.train.set_epoch(epoch)
        labels = torch.cat([labels for _, labels in built.train])
        assert Counter(labels.tolist()) == {0: 8, 1: 8, 2: 8}  # bee/4.jpg took its place
        assert len(built.train.unreadable) == 1
    assert caplog.text.count(str(victim)) == 1  # named once, although both epochs met it


@pytest.mark.parametrize("workers", ["0", "2"])
def test_more_unreadable_images_than_allowed_stop_the_run(folder, workers):
    built = loaders(folder, "DATA.NUM_WORKERS", workers, "DATA.MAX_UNREADABLE", "0.1")
    for i in (0, 3, 6):
        (folder / "train" / "cat" / f"{i}.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"3 of 24 training images are unreadable, 2 are allowed"):
        list(built.train)


def test_a_small_data_set_may_have_one_unreadable_image_by_default(folder):
    (folder / "train" / "cat" / "0.jpg").write_bytes(b"")
    built = loaders(folder)
    assert len(list(built.train)) == 6
    built.train.require_readable(1)
    with pytest.raises(DataError, match="2 of 24 training images are unreadable, 1 are allowed"):
        built.train.require_readable(2)  # the sum over all processes, as the loop counts it
    with pytest.raises(DataError, match="1 of 24 training images are unreadable, 0 are allowed"):
        list(loaders(folder, "DATA.MAX_UNREADABLE", "0").train)


def test_repeats_of_an_unreadable_image_count_once_over_all_processes(folder):
    """They are dealt to different processes, whose counts are summed."""
    (folder / "train" / "cat" / "0.jpg").write_bytes(b"")
    dataset = loaders(folder, "AUG.REPEATS", "3").train.loader.dataset
    victim = dataset.source.labels.tolist().index(2)
    samples = dataset.__getitems__([Draw(0, victim, repeat) for repeat in range(3)])
    assert [len(sample.unreadable) for sample in samples] == [1, 0, 0]


def test_tools_folders_are_no_classes(folder):
    (folder / "train" / ".ipynb_checkpoints").mkdir()
    assert loaders(folder).classes == ("ant", "bee", "cat")


def test_a_data_set_without_any_readable_image_stops_at_once(folder):
    built = loaders(folder, "DATA.MAX_UNREADABLE", "0.1")
    for file in (folder / "train").glob("*/*.jpg"):
        file.write_bytes(b"")
    with pytest.raises(DataError, match="unreadable, 2 are allowed"):
        next(iter(built.train))


@pytest.mark.parametrize("workers", ["0", "2"])
def test_unreadable_image_in_evaluation_is_an_error(folder, workers):
    built = loaders(folder, "DATA.NUM_WORKERS", workers, train=False)
    victim = folder / "val" / "bee" / "1.jpg"
    victim.write_bytes(victim.read_bytes()[:400])
    with pytest.raises(UnreadableImage, match=r"^/\S*bee/1\.jpg: [^\n]*$"):  # one line, from a worker too
        list(built.val)


# ---------------------------------------------------------------------------------------------------------------------
# Zip
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def zipped(folder: Path) -> Path:
    for split in ("train", "val"):
        lines = []
        with zipfile.ZipFile(folder / f"{split}.zip", "w") as archive:
            for file in sorted((folder / split).glob("*/*.jpg")):
                member = f"{file.parent.name}/{file.name}"
                archive.write(file, member)
                lines.append(f"{member}\t{['ant', 'bee', 'cat'].index(file.parent.name)}\n")
        (folder / f"{split}_map.txt").write_text("".join(lines))
    return folder


@pytest.mark.parametrize("mode", ["no", "full", "part"])
@pytest.mark.parametrize("workers", ["0", "2"])
def test_zip_gives_the_same_batches_as_the_folder(zipped, mode, workers):
    plain = loaders(zipped)
    built = loaders(zipped, "DATA.ZIP_MODE", "True", "DATA.CACHE_MODE", mode, "DATA.NUM_WORKERS", workers)
    assert built.classes == plain.classes == ("ant", "bee", "cat")
    for part in ("train", "val"):
        for (images, labels), (expected, expected_labels) in zip(
            getattr(built, part), getattr(plain, part), strict=True
        ):
            assert torch.equal(images, expected) and torch.equal(labels, expected_labels)


def test_flat_zip_has_no_class_names_only_their_number(tmp_path):
    with zipfile.ZipFile(tmp_path / "val.zip", "w") as archive:
        for i in range(4):
            archive.writestr(f"{i}.jpg", jpeg(i))
    (tmp_path / "val_map.txt").write_text("".join(f"{i}.jpg\t{i % 2}\n" for i in range(4)))
    source = ZipSource(tmp_path / "val.zip", tmp_path / "val_map.txt")
    assert source.classes is None and source.num_classes == 2 and list(source.labels) == [0, 1, 0, 1]


def test_each_process_opens_the_zip_itself(zipped):
    source = ZipSource(zipped / "val.zip", zipped / "val_map.txt")
    source.load(0)
    handle = source._handle[1]
    source.load(1)
    assert source._handle[1] is handle  # one handle per process
    source._handle = (os.getpid() + 1, handle)  # as after a fork
    source.load(1)
    assert source._handle[1] is not handle


BAD_MAPS = {
    "ant/0.jpg\t0\nant/99.jpg\t0\n": r"val_map.txt line 2 names 'ant/99.jpg', which .*val.zip does not contain",
    "ant/0.jpg 0\n": r"val_map.txt line 1: expected `path<TAB>label`, received 'ant/0.jpg 0'",
    "ant/0.jpg\t-1\n": r"line 1: expected `path<TAB>label`",
    "\n": r"val_map.txt is empty",
}


@pytest.mark.parametrize(("text", "message"), BAD_MAPS.items(), ids=["missing member", "no tab", "label", "empty"])
def test_bad_map_is_explained(zipped, text, message):
    (zipped / "val_map.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        loaders(zipped, "DATA.ZIP_MODE", "True")


def test_maps_that_disagree_are_explained(zipped):
    text = (zipped / "val_map.txt").read_text()
    swapped = text.replace("\t0", "\tx").replace("\t1", "\t0").replace("\tx", "\t1")
    (zipped / "val_map.txt").write_text(swapped)
    with pytest.raises(DataError, match=r"disagree: 0 is ant and bee, 1 is bee and ant"):
        loaders(zipped, "DATA.ZIP_MODE", "True")


def test_missing_and_damaged_zip_are_explained(zipped):
    (zipped / "val.zip").write_bytes(b"PK damaged")
    with pytest.raises(DataError, match="val.zip is not a readable zip file"):
        loaders(zipped, "DATA.ZIP_MODE", "True")
    (zipped / "val.zip").unlink()
    with pytest.raises(DataError, match=r"val.zip does not exist; --zip needs train.zip, train_map.txt"):
        loaders(zipped, "DATA.ZIP_MODE", "True")


def test_page_cache_shares_cover_the_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(bytes(1000))
    read = []
    real_open = Path.open

    def counting_open(self, *args, **kwargs):
        file = real_open(self, *args, **kwargs)

        class Counting:
            def __enter__(self):
                return self

            def __exit__(self, *exception):
                file.close()

            def seek(self, offset):
                self.start = offset
                file.seek(offset)

            def read(self, count):
                block = file.read(count)
                read.append((file.tell() - len(block), file.tell()))
                return block

        return Counting()

    monkeypatch.setattr(Path, "open", counting_open)
    for share in range(3):
        warm_page_cache(path, share=share, shares=3)
    assert read == [(0, 333), (333, 666), (666, 1000)]


# ---------------------------------------------------------------------------------------------------------------------
# Digits
# ---------------------------------------------------------------------------------------------------------------------


def test_digits_split_is_fixed_stratified_and_complete():
    train, val = DigitsSource("train", (32, 32)), DigitsSource("val", (32, 32))
    names = [source.name(i) for source in (train, val) for i in range(len(source.labels))]
    assert len(set(names)) == len(names) == 1797
    total, held_out = Counter(load_digits().target.tolist()), Counter(val.labels)
    for digit in range(10):
        assert held_out[digit] == total[digit] // 5
    assert val.name(0) == DigitsSource("val", (32, 32)).name(0)
    image = train.load(0)
    assert image.mode == "RGB" and image.size == (32, 32)


# ---------------------------------------------------------------------------------------------------------------------
# Transforms
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "crop", "name"), [(224, True, "224_crop"), (384, False, "384_nocrop")])
def test_evaluation_transform_is_that_of_the_released_models(size, crop, name):
    golden = np.load(REFERENCE / "eval_transform.npz")
    config = load_config(config_file("pola_swin_t"), ["DATA.IMG_SIZE", str(size), "TEST.CROP", str(crop)])
    transform = evaluation_transform(config, image_size(config))
    samples = load_sample_images()
    for file, pixels in zip(samples.filenames, samples.images, strict=True):
        image = f"{Path(file).stem}_{name}"
        tensor = transform(Image.fromarray(pixels))
        assert tensor.dtype == torch.uint8
        tensor = Normalise(torch.device("cpu"))(tensor[None])[0]
        for value, key in ((tensor[:, ::8, ::8], "every8"), (tensor[:, 100], "row100")):
            assert ((value - torch.from_numpy(golden[f"{image}_{key}"])).abs() < 0.02).float().mean() >= 0.999
        assert np.allclose(tensor.double().mean((1, 2)), golden[f"{image}_mean"], atol=2e-3)
        assert np.allclose(tensor.double().std((1, 2)), golden[f"{image}_std"], atol=2e-3)


def test_evaluation_can_keep_the_aspect_ratio():
    photograph = Image.fromarray(load_sample_images().images[0])  # 427×640
    shorter = evaluation_transform(load_config(config_file("pola_swin_t"), ["TEST.RESIZE", "shorter"]), (224, 224))
    squash = evaluation_transform(load_config(config_file("pola_swin_t")), (224, 224))
    bicubic = transforms.InterpolationMode.BICUBIC
    expected = transforms.Compose(
        [transforms.Resize(256, bicubic), transforms.CenterCrop(224), transforms.PILToTensor()]
    )
    for image in (photograph, photograph.transpose(Image.Transpose.ROTATE_90), photograph.resize((300, 300))):
        assert torch.equal(shorter(image), expected(image))
    assert (squash(photograph).float() - expected(photograph).float()).abs().mean() > 10
    wide = evaluation_transform(
        load_config(config_file("pola_swin_t"), ["TEST.RESIZE", "shorter", "DATA.IMG_SIZE", "[64,224]"]), (64, 224)
    )
    assert wide(photograph).shape == (3, 64, 224)


@pytest.mark.parametrize(("size", "ratio"), [*((side, 0.875) for side in (160, 192, 200, 224)), (240, 1.0), (288, 1.0)])
def test_evaluation_of_nalaformer_is_that_of_its_script(size, ratio):
    """The shorter side to int(256/224·size), above 224 pixels to the size itself; pixel for pixel."""
    options = ["DATA.IMG_SIZE", str(size), "TEST.CROP_RATIO", str(ratio)]
    config = load_config(config_file("nalaformer_xt"), options)
    transform = evaluation_transform(config, image_size(config))
    shorter = int(256 / 224 * size) if size <= 224 else size
    resize = transforms.Resize(shorter, transforms.InterpolationMode.BICUBIC)
    expected = transforms.Compose([resize, transforms.CenterCrop(size), transforms.PILToTensor()])
    photograph = Image.fromarray(load_sample_images().images[0])  # 427×640
    for shape in ((640, 427), (427, 640), (301, 200), (97, 131), (300, 300), (shorter, shorter + 1)):
        assert torch.equal(transform(photograph.resize(shape)), expected(photograph.resize(shape))), shape


def test_non_square_and_small_sizes():
    image = Image.fromarray(load_sample_images().images[0])
    for option, shape in (("[64,96]", (3, 64, 96)), ("128", (3, 128, 128))):
        config = load_config(config_file("pola_swin_t"), ["DATA.IMG_SIZE", option])
        assert (
            evaluation_transform(config, image_size(config))(image).shape
            == training_transform(config, image_size(config))(image).shape
            == shape
        )
    config = load_config(config_file("pola_swin_t"), ["DATA.IMG_SIZE", "32", "AUG.AUTO_AUGMENT", "none"])
    small = image.resize((32, 32))
    assert torch.equal(
        evaluation_transform(config, image_size(config))(small), torch.from_numpy(np.array(small)).permute(2, 0, 1)
    )
    assert training_transform(config, image_size(config))(small).shape == (3, 32, 32)


def test_policy_survives_20_000_draws():
    """timm's policy asks for posterize with 0 bits now and then, which Pillow 13 refuses."""
    config = load_config(config_file("pola_swin_t"), ["DATA.IMG_SIZE", "32"])
    policy = training_transform(config, image_size(config)).transforms[2]
    assert type(policy).__name__ == "RandAugment"
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    random.seed(0), np.random.seed(0)
    for _ in range(20_000):
        policy(image)


@pytest.mark.parametrize(
    ("policy", "posterizing"),
    [("original", 5), ("originalr", 5), ("v0", 2), ("v0r", 2), ("augmix-m9-w3", 1), ("rand-m10-inc1", 1), ("3a", 0)],
)
def test_every_policy_renders_zero_bits_as_black(policy, posterizing):
    config = load_config(config_file("pola_swin_t"), ["AUG.AUTO_AUGMENT", policy])
    steps = training_transform(config, image_size(config)).transforms
    found = [op for op in _augment_operations(list(steps)) if op.name.startswith("Posterize")]
    assert len(found) == posterizing
    image = Image.new("RGB", (4, 4), (200, 100, 50))
    for operation in found:
        assert operation.aug_fn(image, 0).getextrema() == ((0, 0),) * 3
        assert operation.aug_fn(image, 8).getextrema() == ((200, 200), (100, 100), (50, 50))


AUG = {
    "MIXUP": ("0.0", "0.8"),
    "CUTMIX": ("0.0", "1.0"),
    "CUTMIX_MINMAX": ("None", "[0.2,0.8]"),
    "MIXUP_MODE": ("batch", "pair", "elem"),
    "REPROB": ("0.0", "1.0"),
}


@pytest.mark.parametrize("values", list(itertools.product(*AUG.values())), ids=str)
@pytest.mark.parametrize("size", [1, 4, 5])
def test_augmentation_keys_in_every_combination(values, size):
    options = [word for name, value in zip(AUG, values, strict=True) for word in (f"AUG.{name}", value)]
    config = load_config(config_file("pola_swin_t"), [*options, "AUG.REMODE", "const"])
    prepare = TrainBatch(config, 10, torch.device("cpu"))
    images, labels = torch.randint(0, 256, (size, 3, 32, 32), dtype=torch.uint8), torch.arange(size)
    random.seed(0), np.random.seed(0)
    mixed, targets = prepare(images.clone(), labels)
    assert mixed.shape == (size, 3, 32, 32) and mixed.dtype == torch.float32 and mixed.isfinite().all()
    mixes = values[0] != "0.0" or values[1] != "0.0" or values[2] != "None"
    if not mixes:
        assert torch.equal(targets, labels)
    else:
        assert targets.shape == (size, 10)
        assert torch.allclose(targets.sum(1), torch.ones(size))
    if size % 2 and mixes:  # the odd image out keeps its own label, smoothed
        assert targets[-1, size - 1] == pytest.approx(0.91)
    plain = Normalise(torch.device("cpu"))(images)
    if values[4] == "1.0":
        assert (mixed == 0).any()
    elif not mixes or size == 1:
        assert torch.equal(mixed, plain)
    else:
        assert not torch.equal(mixed, plain)


# ---------------------------------------------------------------------------------------------------------------------
# Samplers and randomness
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "world"), [(10, 1), (10, 3), (2, 4), (9, 3)])
def test_evaluation_shards_neither_drop_nor_duplicate(size, world):
    shards = [list(EvalSampler(size, rank=rank, world_size=world)) for rank in range(world)]
    assert sorted(itertools.chain(*shards)) == list(range(size))


@pytest.mark.parametrize("repeats", [2, 3, 5])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [24, 25, 257])
def test_repeated_augmentation_deals_an_image_s_repeats_to_the_ranks(size, world_size, repeats):
    """The same draws, all ranks together, for every number of processes, from every start; as many as without."""

    def draws(rank: int, epoch: int, start: int = 0, world: int = world_size) -> list[Draw]:
        sampler = TrainSampler(size, rank=rank, world_size=world, seed=5, repeats=repeats)
        sampler.set_epoch(epoch, start)
        assert len(sampler) == len(TrainSampler(size, rank=rank, world_size=world, seed=5)) == size // world
        return list(sampler)

    for epoch in (0, 1):
        dealt = [draw for one in zip(*(draws(rank, epoch) for rank in range(world_size)), strict=True) for draw in one]
        assert dealt == draws(0, epoch, world=1)[: size // world_size * world_size]
        assert [draw.repeat for draw in dealt] == [place % repeats for place in range(len(dealt))]
        images = [draw.position for draw in dealt]
        assert images == [image for image in images[::repeats] for _ in range(repeats)][: len(images)]
        assert len(set(images)) == -(-len(images) // repeats)
        assert draws(world_size - 1, epoch, 2) == draws(world_size - 1, epoch)[2:]
    assert draws(0, 0) != draws(0, 1) and {draw.epoch for draw in draws(0, 1)} == {1}
    plain = [draw.position for draw in TrainSampler(size, rank=0, world_size=1, seed=5)]
    repeated = [draw.position for draw in draws(0, 0, world=1)][::repeats]
    assert plain[: len(repeated)] == repeated


def test_steps_of_repeated_augmentation_are_the_same_images_for_any_processes_and_workers(folder, monkeypatch):
    """And of any number of passes, from an epoch's middle too: pixel for pixel, of all ranks together."""

    def steps(world_size: int, workers: int, batch: int, start: int = 0) -> list[Counter]:
        options = f"AUG.REPEATS 3 DATA.NUM_WORKERS {workers} DATA.BATCH_SIZE {batch} TRAIN.GLOBAL_BATCH 12"
        ranks = []
        for rank in range(world_size):
            with monkeypatch.context() as patched:
                patched.setattr("utils.distributed.rank", lambda rank=rank: rank)
                config = load_config(config_file("nalaformer_xt"), f"DATA.DATA_PATH {folder} {options}".split())
                plan = make_plan(config, world_size)
                train = build_loaders(config, plan).train
            found: list[Counter] = []
            for epoch in (0, 1):
                train.set_epoch(epoch, start * plan.accumulation)
                batches = [Counter(image.numpy().tobytes() for image in images) for images, _ in train]
                passes = plan.accumulation
                found += [sum(batches[i : i + passes], Counter()) for i in range(0, len(batches), passes)]
            train.close()
            ranks.append(found)
        return [sum(one, Counter()) for one in zip(*ranks, strict=True)]

    expected = steps(1, 0, 12)
    assert [step.total() for step in expected] == [12] * 4 and all(len(step) == 12 for step in expected)
    for world_size, workers, batch in ((1, 3, 4), (2, 1, 6), (3, 0, 4), (3, 0, 2)):
        assert steps(world_size, workers, batch) == expected, (world_size, workers, batch)
    assert steps(2, 0, 6, start=1) == expected[1::2]


def test_repeats_go_on_over_epochs_of_a_number_of_steps():
    """TRAIN.STEPS: passes follow each other without remainder, whatever the number of processes."""
    streams = []
    for world_size in (1, 2):
        samplers = [
            TrainSampler(7, rank=rank, world_size=world_size, seed=5, samples=10 // world_size, repeats=3)
            for rank in range(world_size)
        ]
        stream = []
        for epoch in range(4):
            for sampler in samplers:
                sampler.set_epoch(epoch)
            stream += [draw for one in zip(*samplers, strict=True) for draw in one]
        streams.append(stream)
    assert streams[0] == streams[1] and len(streams[0]) == 40
    assert sorted(draw.position for draw in streams[0][:21]) == sorted([*range(7)] * 3)


def test_repeats_of_an_image_are_augmented_differently_and_reproducibly():
    states = []
    for repeat in (0, 1, 2, 1):
        with SampleRandomness(3) as randomness:
            randomness.start(Draw(2, 7, repeat))
            states.append(torch.rand(3).tolist())
    assert states[1] == states[3] and states[0] != states[1] != states[2] != states[0]


def test_training_shards_are_disjoint_equal_and_a_function_of_seed_and_epoch():
    def shards(epoch, seed=0):
        samplers = [TrainSampler(11, rank=rank, world_size=2, seed=seed) for rank in range(2)]
        for sampler in samplers:
            sampler.set_epoch(epoch)
        return [list(sampler) for sampler in samplers]

    first, second = shards(3)
    assert len(first) == len(second) == 5 == len(TrainSampler(11, rank=0, world_size=2, seed=0))
    assert len({draw.position for draw in first + second}) == 10
    assert {draw.epoch for draw in first} == {3}
    assert shards(3) == [first, second]
    assert shards(4) != [first, second] and shards(3, seed=1) != [first, second]


@pytest.mark.parametrize("workers", ["0", "2"])
def test_an_epoch_continues_after_any_number_of_batches(folder, workers):
    built = loaders(folder, "DATA.NUM_WORKERS", workers)
    built.train.set_epoch(1)
    whole = [images for images, _ in built.train]
    assert len(whole) > 2
    for start in (1, len(whole) - 1, len(whole)):
        built.train.set_epoch(1, start)
        rest = [images for images, _ in built.train]
        assert len(rest) == len(whole) - start and all(map(torch.equal, rest, whole[start:]))
    built.train.set_epoch(1)
    assert len(list(built.train)) == len(whole)


def test_augmentation_is_a_function_of_seed_epoch_and_index(folder):
    def images(workers, seed="0", epoch=1):
        built = loaders(folder, "DATA.NUM_WORKERS", workers, "SEED", seed)
        built.train.set_epoch(epoch)
        return torch.cat([images for images, _ in built.train])

    expected = images("0")
    assert torch.equal(images("2"), expected)
    assert not torch.equal(images("0", seed="1"), expected)
    assert not torch.equal(images("0", epoch=2), expected)


def test_drawing_in_the_main_process_leaves_its_generators_alone():
    config = load_config(config_file("pola_swin_t"), ["DATA.IMG_SIZE", "32"])
    dataset = TrainDataset(
        DigitsSource("val", (32, 32)), training_transform(config, image_size(config)), seed=0, max_unreadable=0
    )
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    expected = random.random(), np.random.rand(), torch.rand(1)
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    dataset[Draw(0, 3)]
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected


def test_small_sizes_resize_only_what_has_another_size(folder):
    exact = jpeg(0, (32, 32))
    (folder / "val" / "ant" / "0.jpg").write_bytes(exact)
    images, _ = next(iter(loaders(folder, "DATA.IMG_SIZE", "32", train=False).val))
    assert images.shape == (4, 3, 32, 32)
    assert torch.equal(images[0], torch.from_numpy(np.array(Image.open(io.BytesIO(exact)))).permute(2, 0, 1))
    built = loaders(folder, "DATA.IMG_SIZE", "32")
    assert next(iter(built.train))[0].shape == (4, 3, 32, 32)
