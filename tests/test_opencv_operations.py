"""AUG.BACKEND opencv: timm's draws, Pillow's pixels within the bounds that docs/data.md states, and what it refuses.

pytest tests/test_opencv_operations.py
"""

import pickle
import random
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT, config_file
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data.auto_augment import LEVEL_TO_ARG, NAME_TO_OP, AugmentOp
from torchvision.transforms.functional import pil_to_tensor

import data.sources.base
from config import load_config, make_plan
from data import opencv_operations
from data.datasets import SampleRandomness
from data.loaders import Loaders, build_loaders
from data.opencv_operations import OPERATIONS
from data.samplers import Draw
from data.sources.base import DataError
from data.transforms import _augment_operations, repair_posterize, training_transform

PHOTOGRAPHS = [
    Image.fromarray(pixels).resize((224, 224), Image.Resampling.BICUBIC) for pixels in load_sample_images().images
]
FILL = (124, 116, 104)
POLICIES = ["rand-m9-mstd0.5-inc1", "rand-m30-n3-mmax40-mstd101", "rand-m7-p0.8-tweights"]
POLICIES += ["original", "originalr-mstd0.5", "v0", "v0r"]


def transform(*options: str, backend: str = "opencv"):
    return training_transform(load_config(config_file("pola_swin_t"), ["AUG.BACKEND", backend, *options]), (224, 224))


def both(name: str, magnitude: float, filter_name: str = "BICUBIC") -> tuple[AugmentOp, AugmentOp]:
    """timm's operation by Pillow and by OpenCV; strengths are drawn from 0 to `magnitude`."""
    parameters = {"img_mean": FILL, "interpolation": Image.Resampling[filter_name]}
    parameters |= {"magnitude_std": float("inf"), "magnitude_max": magnitude}
    exact, fast = (AugmentOp(name, prob=1.0, magnitude=magnitude, hparams=parameters) for _ in range(2))
    repair_posterize([exact])
    fast.aug_fn = OPERATIONS[fast.aug_fn.__name__]
    return exact, fast


def deviations(name: str, images: list[Image.Image], magnitude: float = 10, filter_name: str = "BICUBIC") -> np.ndarray:
    """Of OpenCV's results from Pillow's with the same random numbers, in grey levels; 16 strengths."""
    exact, fast = both(name, magnitude, filter_name)
    found = []
    for seed in range(16):
        image = images[seed % len(images)]
        random.seed(seed)
        expected, state = np.asarray(exact(image)), random.getstate()
        array = np.array(image)
        random.seed(seed)
        result = fast(array)
        assert random.getstate() == state  # as many draws
        assert result.dtype == np.uint8 and result.shape == expected.shape
        assert np.array_equal(array, np.asarray(image))  # nothing is changed in place
        found.append(np.abs(result.astype(int) - expected).ravel())
    return np.concatenate(found)


# ---------------------------------------------------------------------------------------------------------------------
# Pixels
# ---------------------------------------------------------------------------------------------------------------------


def documented() -> dict[str, tuple[str, float, int]]:
    """By operation: its line in docs/data.md, and the mean and largest deviation that this line states."""
    lines = re.findall(
        r"^\| ([A-Z][\w, ]+) \| ([\d.]+) \| (\d+) \|$", (ROOT / "docs/data.md").read_text(), re.MULTILINE
    )
    return {name: (names, float(mean), int(most)) for names, mean, most in lines for name in names.split(", ")}


def test_the_documented_deviations_are_the_measured_ones():
    stated = documented()
    assert len(stated) == len(set(OPERATIONS)) and {NAME_TO_OP[name].__name__ for name in stated} == set(OPERATIONS)
    found: dict[str, list[tuple[float, int]]] = {}
    for name, (line, mean, most) in stated.items():
        difference = deviations(name, PHOTOGRAPHS)
        assert difference.mean() <= mean and difference.max() <= most, name
        found.setdefault(line, []).append((float(difference.mean()), int(difference.max())))
    for line, measured in found.items():  # and the table does not say more than it has to
        mean, most = next((mean, most) for names, mean, most in stated.values() if names == line)
        assert 0.5 * mean <= max(each for each, _ in measured) and 0.8 * most <= max(each for _, each in measured), line


@pytest.mark.parametrize("filter_name", ["BICUBIC", "BILINEAR", "NEAREST"])
@pytest.mark.parametrize("name", ["ShearX", "ShearY", "TranslateXRel", "TranslateYRel"])
def test_shears_and_translations_are_pillows_for_every_filter_and_strength(name, filter_name):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 100, 3), dtype=np.uint8))
    difference = deviations(name, [noise], 30, filter_name)  # translated out of sight, too
    if filter_name == "NEAREST":
        assert (difference > 0).mean() < 0.01  # a place halfway between two pixels
    else:
        assert difference.max() <= 1 and difference.mean() < 0.01


@pytest.mark.parametrize(("filter_name", "mean"), [("BICUBIC", 1.0), ("BILINEAR", 0.7), ("NEAREST", 0.05)])
def test_rotations_differ_by_rounding_and_the_edge_in_every_filter(filter_name, mean):
    wide = PHOTOGRAPHS[0].crop((0, 0, 224, 100))
    assert deviations("Rotate", [wide, PHOTOGRAPHS[1]], 10, filter_name).mean() < mean
    assert deviations("Rotate", [Image.new("RGB", (90, 40), FILL)], 10, filter_name).max() <= 1


@pytest.mark.parametrize("name", [n for n in NAME_TO_OP if NAME_TO_OP[n].__name__ in OPERATIONS and LEVEL_TO_ARG[n]])
def test_strengths_beyond_timms_usual_ones_work(name):
    assert deviations(name, [PHOTOGRAPHS[0].crop((0, 0, 90, 60))], 40).mean() < (3 if name == "Rotate" else 0.01)


@pytest.mark.parametrize("name", ["AutoContrast", "Equalize", "Contrast", "Color", "Sharpness", "Invert"])
def test_images_of_few_levels_are_pillows(name):
    one, two = Image.new("RGB", (40, 40), (7, 250, 0)), Image.new("RGB", (40, 40), (9, 9, 200))
    two.paste((9, 10, 255), (0, 0, 40, 13))
    narrow = Image.fromarray(np.random.default_rng(0).integers(100, 140, (16, 16, 3), dtype=np.uint8))
    assert deviations(name, [one, two, narrow]).max() <= (0 if name in ("AutoContrast", "Equalize", "Invert") else 1)


# ---------------------------------------------------------------------------------------------------------------------
# Draws
# ---------------------------------------------------------------------------------------------------------------------


def recorded(policy: str, backend: str) -> list:
    """Operations and strengths of 300 images, and where each leaves the random generators."""
    steps = transform("AUG.AUTO_AUGMENT", policy, "AUG.HFLIP", "0", backend=backend).transforms[1:]
    calls: list = []

    def recording(operation: AugmentOp):
        function = operation.aug_fn

        def call(image, *arguments, **how):
            calls.append((operation.name, *arguments))
            return function(image, *arguments, **how)

        return call

    for operation in _augment_operations(list(steps)):
        operation.aug_fn = recording(operation)
    image = PHOTOGRAPHS[0].resize((16, 16))
    for position in range(300):
        with SampleRandomness(0, Draw(1, position)):
            result = image
            for step in steps:
                result = step(result)
            calls.append((random.random(), np.random.random(), float(torch.rand(1))))
    return calls


@pytest.mark.parametrize("policy", POLICIES)
def test_operations_and_strengths_are_those_of_timm(policy):
    calls = recorded(policy, "opencv")
    assert calls == recorded(policy, "pillow")
    assert len(calls) > 450  # 300 ends, and operations between them


@pytest.mark.parametrize("decoder", ["pillow", "simplejpeg"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "nearest"])
def test_the_whole_transform_draws_and_shows_what_pillow_does(decoder, interpolation):
    options = ["DATA.DECODER", decoder, "DATA.INTERPOLATION", interpolation]
    fast = pickle.loads(pickle.dumps(transform(*options)))  # as it comes to workers that are not forked
    exact = transform(*options, backend="pillow")
    photograph = PHOTOGRAPHS[1].resize((250, 188))
    picture = pil_to_tensor(photograph) if decoder == "simplejpeg" else photograph
    different = 0
    for position in range(30):
        results, ends = [], []
        for each in (fast, exact):
            with SampleRandomness(0, Draw(0, position)):
                results.append(each(picture))
                ends.append((random.random(), np.random.random(), float(torch.rand(1))))
        assert ends[0] == ends[1]
        assert results[0].shape == (3, 224, 224) and results[0].dtype == torch.uint8 and results[0].is_contiguous()
        difference = (results[0].int() - results[1].int()).abs().double().mean()
        assert difference < 3
        different += bool(difference)
    assert 0 < different < 30


# ---------------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split, count in (("train", 10), ("val", 1)):
        for label, name in enumerate(("ant", "bee")):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                crop = PHOTOGRAPHS[label].crop((5 * i, 0, 5 * i + 120, 100))
                crop.save(tmp_path / split / name / f"{i}.jpg", quality=95)
    return tmp_path


def loaders(root: Path, *options: str, train: bool = True) -> Loaders:
    fixed = f"DATA.DATA_PATH {root} DATA.IMG_SIZE 64 DATA.BATCH_SIZE 4 DATA.NUM_WORKERS 0 AUG.BACKEND opencv".split()
    config = load_config(config_file("pola_swin_t"), [*fixed, "TRAIN.GLOBAL_BATCH", "null", *options])
    return build_loaders(config, make_plan(config), train=train)


def batches(built: Loaders, epoch: int, start: int = 0) -> list[torch.Tensor]:
    assert built.train is not None
    built.train.set_epoch(epoch, start)
    found = [images for images, _ in built.train]
    built.close()
    return found


def test_an_image_depends_on_seed_epoch_and_place_alone(folder):
    """Neither on the workers, nor on where a run continues; nor do OpenCV's threads stop forked workers."""
    alone = batches(loaders(folder), 3)
    assert cv2.getNumThreads() == 1
    for workers in ("1", "3"):
        assert all(map(torch.equal, batches(loaders(folder, "DATA.NUM_WORKERS", workers), 3), alone))
    assert all(map(torch.equal, batches(loaders(folder), 3, start=2), alone[2:]))
    assert all(map(torch.equal, batches(loaders(folder, "DATA.NUM_WORKERS", "2"), 3, start=2), alone[2:]))
    assert not any(map(torch.equal, batches(loaders(folder), 4), alone))
    assert not any(map(torch.equal, batches(loaders(folder, "SEED", "7"), 3), alone))


def test_evaluation_is_the_same_whatever_augments(folder):
    fast, exact = (list(loaders(folder, "AUG.BACKEND", each).val) for each in ("opencv", "pillow"))
    assert all(torch.equal(images, expected) for (images, _), (expected, _) in zip(fast, exact, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Refusals
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "lacking"),
    [
        ("augmix-m3", "AugMixAugment"),
        ("3a", "Desaturate, GaussianBlurRand, ColorJitter"),
        ("rand-m9-t3aw", "Desaturate, GaussianBlur, ColorJitter"),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(folder, policy, lacking):
    message = (
        f"^AUG.BACKEND opencv cannot do {lacking}, which AUG.AUTO_AUGMENT {policy} asks for; set AUG.BACKEND pillow"
    )
    with pytest.raises(DataError, match=message):
        loaders(folder, "AUG.AUTO_AUGMENT", policy)
    assert loaders(folder, "AUG.AUTO_AUGMENT", policy, train=False).val.num_images == 2  # evaluation augments nothing


def test_colour_jitter_is_refused_by_its_own_key():
    with pytest.raises(DataError, match="cannot do ColorJitter, which AUG.COLOR_JITTER asks for where AUG.AUTO_AUG"):
        transform("AUG.AUTO_AUGMENT", "none")


def test_an_operation_that_it_does_not_know_is_refused_by_name(monkeypatch):
    for name in ("rotate", "sharpness"):
        monkeypatch.delitem(opencv_operations.OPERATIONS, name)
    with pytest.raises(
        DataError, match="cannot do Rotate, SharpnessIncreasing, which AUG.AUTO_AUGMENT rand-m9-mstd0.5"
    ):
        transform()


def test_a_missing_or_damaged_opencv_is_named_with_its_remedy(folder, monkeypatch):
    remedy = "; `pip install opencv-python-headless` or set AUG.BACKEND pillow$"

    def damaged(module: str) -> None:
        raise ImportError("libGL.so.1: cannot open shared object file")

    with monkeypatch.context() as patch:
        patch.setattr(data.sources.base, "import_module", damaged)
        with pytest.raises(DataError, match=f"^AUG.BACKEND is opencv, which cannot be imported .libGL.*file.{remedy}"):
            loaders(folder)
    monkeypatch.setattr(data.sources.base, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=f"^AUG.BACKEND is opencv, which is not installed{remedy}"):
        loaders(folder)
    assert loaders(folder, train=False).val.num_images == 2  # evaluation needs none
    assert loaders(folder, "AUG.BACKEND", "pillow").train  # nor does the default
