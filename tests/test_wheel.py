"""The models as a library: the wheel, torch.hub, two copies in a process, folders whose own modules have our names.

pytest tests/test_wheel.py
"""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from conftest import PPP, RELEASED, ROOT, TINY_PPP

from config import load_config
from models import build_model, load
from utils.checkpoints.writing import save_checkpoint

# What a research project of this kind has at its top, and would shadow modules of ours.
FOREIGN = ("models/__init__.py", "data/__init__.py", "utils/__init__.py", "config.py", "logger.py")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of a checkout without anything that git does not know."""
    folder = tmp_path_factory.mktemp("build")
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "models", "pyproject.toml", "README.md", "LICENSE"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for name in listed.stdout.splitlines():
        target = folder / "source" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "./source"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    (built,) = folder.glob("polaformer-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture
def project(tmp_path) -> Path:
    """A folder with modules of somebody else's."""
    for name in FOREIGN:
        path = tmp_path / "project" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("OWNER = 'somebody else'\n")
    return tmp_path / "project"


def python(code: str, cwd: Path, *paths: Path) -> str:
    """Run code in an interpreter of its own, with `paths` before everything installed; returns what it printed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_the_wheel_holds_the_folder_and_declares_what_it_imports(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if name.startswith("polaformer/")}
        about = next(name for name in archive.namelist() if name.endswith("METADATA"))
        metadata = archive.read(about).decode()
    folder = ROOT / "models"
    expected = {
        f"polaformer/{path.relative_to(folder)}"
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert names == expected and "polaformer/py.typed" in names
    for package in ("torch", "torchvision", "timm", "einops", "safetensors", "PyYAML"):
        assert f"Requires-Dist: {package}>=" in metadata, package
    assert "<" not in "".join(line for line in metadata.splitlines() if line.startswith("Requires-Dist"))


PPP_CONFIG = {"MODEL": yaml.safe_load(TINY_PPP)["MODEL"]}
USE = f"""
import config, data, models, utils, warnings
assert {{m.OWNER for m in (config, data, models, utils)}} == {{'somebody else'}}
warnings.simplefilter('error', UserWarning)
import polaformer, timm, torch
model = timm.create_model('pola_swin_tiny', img_size=64, num_classes=3).eval()
assert model(torch.randn(1, 3, 64, 64)).shape == (1, 3) and type(model).__module__ == 'polaformer.pola_swin'
q = torch.randn(2, 9, 2, 4)
assert polaformer.polarity_attention(q, q, q, torch.full((2, 4), 3.0)).shape == q.shape
loaded = polaformer.load({str(RELEASED)!r})
assert not loaded.training and len(loaded.classes or range(10)) == 10
assert type(loaded.config) is type(loaded.config['MODEL']) is dict and loaded.config['MODEL']['LA']['ALPHA'] == 4
torch.save(loaded(torch.ones(1, 3, 64, 64)).detach(), 'logits.pt')
other = polaformer.load({str(PPP / "checkpoint_ppp_tiny.pth")!r}, 'ema', config={PPP_CONFIG!r})
assert other(torch.ones(1, 3, 40, 56)).shape == (1, 10) and type(other).__module__ == 'polaformer.pola_pp'
by_hub = torch.hub.load({str(ROOT)!r}, 'pola_pvt_tiny', source='local', img_size=32, num_classes=2)
assert type(by_hub).__module__ == 'polaformer.pola_pvt' and models.OWNER == 'somebody else'
"""


def test_the_wheel_works_in_a_folder_whose_modules_have_our_names(installed, project, tmp_path):
    python(USE, project, installed)
    logits = torch.load(project / "logits.pt", weights_only=True)
    assert torch.allclose(logits, load(RELEASED)(torch.ones(1, 3, 64, 64)), atol=1e-6)


def test_the_wheel_rebuilds_a_model_of_sequences_and_averaged_weights(installed, project, tmp_path):
    options = "MODEL.LRA.LENGTH 16 MODEL.LRA.DIM 16 MODEL.LRA.MLP_DIM 16".split()
    config = load_config(str(ROOT / "configs" / "lra" / "listops.yaml"), options)
    weights, averaged = (build_model(config, 10).state_dict() for _ in range(2))
    file = tmp_path / "sequences.pth"
    content = {"model": weights, "model_ema": averaged, "classes": list("0123456789"), "config": config.dump()}
    save_checkpoint(content, file)
    printed = python(
        f"import polaformer, torch\n"
        f"for weights in ('auto', 'model', 'ema'):\n"
        f"    model = polaformer.load({str(file)!r}, weights=weights)\n"
        f"    print(type(model).__name__, len(model.classes), model.head.bias.abs().sum().item())\n"
        f"print(model(torch.ones(2, 9, dtype=torch.long)).shape)\n",
        project,
        installed,
    ).splitlines()
    assert printed[0] == printed[1] != printed[2] and printed[0].startswith("SequenceClassifier 10 ")
    assert printed[3] == "torch.Size([2, 10])"


HUB = f"""
import models, timm, torch
model = torch.hub.load({str(ROOT)!r}, 'pola_swin_tiny', source='local', img_size=64)
assert type(model).__module__ == 'polaformer.pola_swin' and models.OWNER == 'somebody else'
assert type(timm.create_model('pola_pvt_tiny', img_size=32)).__module__ == 'polaformer.pola_pvt'
"""


def test_torch_hub_works_without_the_wheel_where_models_is_somebody_else_s(project):
    python(HUB, project)


TWO_COPIES = """
import pickle, sys, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    import {first}
    import {second}
    import main
    import {first}.ops.polarity_attention as one
    import {second}.ops.polarity_attention as other
ours = [str(w.message) for w in caught if 'copy' in str(w.message) or 'verwriting' in str(w.message)]
assert len(ours) == 1 and ours[0].startswith('{second} is a second copy of {first}'), ours
import timm, torch
assert type(timm.create_model('pola_swin_tiny', img_size=32)).__module__.startswith('{first}.')
q = torch.randn(1, 9, 2, 4, requires_grad=True)
exponent = torch.full((2, 4), 3.0)
results = []
for package in (one, other):
    out = package.polarity_attention(q, q, q, exponent, backend='triton')
    results += [out, *torch.autograd.grad(out.square().sum(), q)]
assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[3])
config = {{'MODEL': {{'TYPE': 'pola_pvt_tiny', 'NUM_CLASSES': 2}}, 'DATA': {{'IMG_SIZE': 32}}}}
for package in ({first}, {second}):
    model = package.build_model(config).eval()
    again = pickle.loads(pickle.dumps(model))
    images = torch.ones(1, 3, 32, 32)
    assert torch.equal(again(images), model(images)) and type(again) is type(model)
    pickle.dump(model, open(package.__name__ + '.pickle', 'wb'))
"""


def test_two_copies_in_a_process_register_once_and_warn_once(installed, tmp_path):
    """main.py's `models` and the wheel's package, in either order; a pickle of either is read with the other."""
    for first, second in (("models", "polaformer"), ("polaformer", "models")):
        python(TWO_COPIES.format(first=first, second=second), tmp_path, ROOT, installed)
    python(
        "import pickle\nimport polaformer\nfor name in ('models', 'polaformer'):\n"
        "    assert type(pickle.load(open(name + '.pickle', 'rb'))).__module__ == name + '.pola_pvt'\n",
        tmp_path,
        ROOT,
        installed,
    )
