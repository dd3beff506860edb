"""Shared by all tests: the reference fixtures, the recipe's weights, small configurations, and a way to run main.py."""

import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

# Without a GPU, Triton's kernels run in its interpreter; it is asked for before anything imports them.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

# Tests meet the native backend where they ask for it, and not because somebody has built it for this machine.
os.environ["POLAFORMER_CACHE"] = os.devnull

torch.set_flush_denormal(True)
torch.set_num_threads(1)  # small tensors: more threads only wait for each other

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "tests" / "fixtures" / "reference"
PPP = ROOT / "tests" / "fixtures" / "ppp"  # PolaFormer++
sys.path.insert(0, str(REFERENCE))  # recipe.py: the weights and inputs every fixture is built from
sys.path.insert(0, str(ROOT / "tests"))

import recipe  # noqa: E402
from forkserver import Forkserver  # noqa: E402

import main  # noqa: E402
from config import load_config  # noqa: E402
from logger import get_logger  # noqa: E402
from models.ops.polarity_attention import native  # noqa: E402

# The interpreter for processes that tests start. A GPU cannot be used by a fork, so there it is the usual one.
FORKSERVER = Forkserver() if DEVICE == "cpu" else None
PYTHON = FORKSERVER.python if FORKSERVER else sys.executable

OFFICIAL = [
    "pola_pvt_t",
    "pola_pvt_s",
    "pola_pvt_m",
    "pola_pvt_b",
    "pola_swin_t",
    "pola_swin_s",
    "pola_swin_b",
    "pola_swin_b_384",
]


@pytest.fixture(autouse=True)
def _native_backend(request):
    """Build and load the native backend for a test that is given its name."""
    names = getattr(request.node, "callspec", None)
    if names is None or not any(isinstance(value, str) and value == "native" for value in names.params.values()):
        yield
        return
    if shutil.which("g++") is None:
        pytest.skip("needs a C++ compiler")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(native.FOLDER_VARIABLE, str(Path(tempfile.gettempdir(), f"polaformer-tests-{os.getuid()}")))
        if not native.library().exists():
            native.build()
        native.is_loaded.cache_clear()
        yield
    native.is_loaded.cache_clear()


def cpu_seconds() -> float:
    """CPU time of this process and of all that it started and that has ended, also by the server of forks.

    What a promise in seconds is checked by: a machine with other work delays everything, and this not.
    """
    return sum(os.times()[:4]) + (FORKSERVER.cpu_seconds() if FORKSERVER else 0.0)


# Seconds that a test waits for what should come within a minute. Not a promise: those are in CPU seconds, or in what
# would have been waited for otherwise. It is there to end a test that hangs, and to say what did not come.
PATIENCE = 900


def config_file(name: str) -> str:
    return str(ROOT / "configs" / f"{name}.yaml")


def read_json(name: str, folder: Path = REFERENCE) -> dict:
    return json.loads((folder / name).read_text())


RELEASED = REFERENCE / "checkpoint_official_tiny.pth"
RELEASED_OPTIONS = [
    *read_json("checkpoint_official_tiny.json")["opts"],
    "DATA.DATASET",
    "digits",
    "DATA.NUM_WORKERS",
    "0",
]


def fill_with_recipe(model: nn.Module) -> nn.Module:
    """Give every parameter the value the recipe derives from its name."""
    own = model.state_dict()  # counters and rotary angles stay as the model has them
    model.load_state_dict(own | {name: torch.from_numpy(value) for name, value in recipe.fill(own).items()})
    return model


def recipe_input(size: int) -> Tensor:
    return torch.from_numpy(recipe.input_batch(size))


def largest_deviation(value: Tensor, expected: Tensor | np.ndarray) -> float:
    """Largest absolute difference over the largest entry of `expected`."""
    expected = torch.as_tensor(expected)
    return ((value - expected).abs().max() / expected.abs().max()).item()


def jpeg(seed: int, size: tuple[int, int] = (48, 40)) -> bytes:
    """A photograph-like JPEG of (width, height)."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


# A model of a few thousand parameters on the bundled digits: one epoch takes about a second. RandAugment would be a
# third of it; tests of augmentation ask for it.
TINY = """
DATA: {DATASET: digits, IMG_SIZE: 32, BATCH_SIZE: 64, NUM_WORKERS: 0}
MODEL:
  TYPE: pola_swin
  NAME: tiny
  DROP_PATH_RATE: 0.1
  SWIN: {PATCH_SIZE: 4, EMBED_DIM: 8, DEPTHS: [1, 1, 1, 1], NUM_HEADS: [1, 2, 2, 4], WINDOW_SIZE: 56}
  LA: {ATTN_TYPE: LLSS}
TRAIN: {EPOCHS: 2, WARMUP_EPOCHS: 1, BASE_LR: 8.0e-3}
AUG: {AUTO_AUGMENT: none, COLOR_JITTER: 0.0}
PRINT_FREQ: 5
"""

# PolaFormer++ of the checkpoint fixture's sizes: rotary positions, BatchNorm and an average.
TINY_PPP = """
DATA: {DATASET: digits, IMG_SIZE: 32, BATCH_SIZE: 64, NUM_WORKERS: 0, TRAIN_FRACTION: 0.5}
MODEL:
  TYPE: pola_pp
  NAME: tiny
  DROP_PATH_RATE: 0.1
  LA: {ATTENTION: polarity_pp}
  PPP:
    EMBED_DIMS: [16, 16, 16, 32]
    DEPTHS: [1, 2, 1, 1]
    NUM_HEADS: [1, 2, 2, 2]
    PROJECTION: 40
    LAYER_INIT_VALUES: [1.0, 1.0, 1.0e-6, 1.0]
TRAIN: {EPOCHS: 3, WARMUP_EPOCHS: 1, BASE_LR: 4.0e-3}
EMA: {ENABLE: True, DECAY: 0.9}
AUG: {AUTO_AUGMENT: none, COLOR_JITTER: 0.0}
PRINT_FREQ: 5
"""

# NaLaFormer of its checkpoint fixture's sizes, trained as its recipe says.
TINY_NALA = TINY_PPP.replace("pola_pp", "nalaformer").replace("polarity_pp", "norm_aware")
TINY_NALA = TINY_NALA.replace("BASE_LR: 4.0e-3", "BASE_LR: 4.0e-3, SCALE_WARMUP_MIN_LR: False, CLIP_GRAD: null")
TINY_NALA = TINY_NALA.replace("CLIP_GRAD: null", "CLIP_GRAD: null, SYNC_BN: True, LR_SCHEDULER: {PER_EPOCH: True}")
TINY_NALA = TINY_NALA.replace("DECAY: 0.9", "DECAY: 0.9, DECAY_PER_512: True")
TINY_NALA = TINY_NALA.replace("AUG: {", "TEST: {RESIZE: shorter}\nAUG: {REPEATS: 3, ")


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """Path of a tiny configuration file; its run folder is `tmp_path / "out" / "tiny" / "default"`.

    On half of the training images: 11 steps an epoch.
    """
    return write_tiny(tmp_path, TINY.replace("NUM_WORKERS: 0", "NUM_WORKERS: 0, TRAIN_FRACTION: 0.5"))


@pytest.fixture
def tiny_ppp(tmp_path: Path) -> Path:
    """As `tiny`, of a small PolaFormer++."""
    return write_tiny(tmp_path, TINY_PPP)


@pytest.fixture
def tiny_nala(tmp_path: Path) -> Path:
    """As `tiny`, of a small NaLaFormer and its recipe."""
    return write_tiny(tmp_path, TINY_NALA)


def write_tiny(folder: Path, text: str = TINY) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(text + f"OUTPUT: {folder / 'out'}\n")
    return path


def run_main(
    *arguments: str | Path,
    processes: int = 0,
    check: bool = True,
    launcher: Sequence[str] = (),
) -> subprocess.CompletedProcess:
    """Run main.py in its own process, or under torchrun with `processes`; fails with its output unless it exits 0."""
    command = [PYTHON]
    if launcher:
        command += launcher
    elif processes:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += ["main.py", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if check and result.returncode:
        pytest.fail(f"{' '.join(command)} exited {result.returncode}\n{result.stdout}\n{result.stderr}")
    return result


def run_tool(*arguments: str | Path) -> subprocess.CompletedProcess:
    """Run Python with these arguments in the repository root; its exit code is the caller's to check."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


# Files with the longest tests.
FIRST = ("test_survival", "test_quickstart", "test_new_kernel", "test_wheel", "test_lra_runs", "test_resume")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests first: begun last, one would run on while the other cores have nothing left to do."""
    items.sort(key=lambda item: FIRST.index(item.path.stem) if item.path.stem in FIRST else len(FIRST))


@pytest.fixture(autouse=True)
def no_log_of_earlier_runs() -> None:
    """A run inside the test process leaves its console and its file open; they would speak in the next test."""
    get_logger().handlers.clear()


@pytest.fixture
def log(caplog):
    """The run's log as text, although its logger writes to the console itself."""
    logger = get_logger()
    previous, logger.propagate = logger.propagate, True

    handler = caplog.handler
    real_setup = main.setup_logger

    def setup(*arguments):
        real_setup(*arguments)
        logger.addHandler(handler)

    main.setup_logger = setup
    yield caplog
    main.setup_logger = real_setup
    logger.propagate = previous
    logger.handlers.clear()


def run(cfg: Path, options: str = "") -> None:
    """main.main in this process; without the picture of its curves, which takes as long as an epoch."""
    with mock.patch("utils.curves.draw_curves", return_value=None):
        main.main(load_config(str(cfg), shlex.split(options)))


def folder_of(tiny: Path) -> Path:
    return tiny.parent / "out" / "tiny" / "default"
