"""docs/own_images.md, followed to the letter on photographs: from the folder to the export.

pytest tests/test_own_images.py
"""

import json
import os
import re
import shutil
import subprocess

import numpy as np
import pytest
import yaml
from conftest import PYTHON, RELEASED, ROOT, read_json
from PIL import Image
from sklearn.datasets import load_sample_images
from test_documentation import blocks, commands_in

from config import load_config

PAGE = ROOT / "docs" / "own_images.md"


@pytest.fixture
def user(tmp_path):
    """The repository by links, crops of two photographs in PHOTOS, and the small checkpoint in place of Pola-Swin-T."""
    for entry in ROOT.iterdir():
        if entry.name not in ("output", ".git", ".venv", "configs"):
            (tmp_path / entry.name).symlink_to(entry)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    described = read_json("checkpoint_official_tiny.json")["opts"]
    pairs = list(zip(described[::2], described[1::2], strict=True))
    model: dict = yaml.safe_load((ROOT / "configs" / "pola_swin_t.yaml").read_text())
    for key, value in pairs:
        section, *path, leaf = key.split(".")
        if section == "MODEL" or leaf == "IMG_SIZE":
            node = model.setdefault(section, {})
            for part in path:
                node = node.setdefault(part, {})
            node[leaf] = yaml.safe_load(value)
    (tmp_path / "configs" / "pola_swin_t.yaml").write_text(yaml.safe_dump(model))
    shutil.copy(RELEASED, tmp_path / "FILE.pth")
    (tmp_path / "photos.yaml").write_text(next(blocks(PAGE, "yaml")))
    generator = np.random.default_rng(0)
    for name, picture in zip(("temple", "flower"), load_sample_images().images, strict=True):
        (tmp_path / "PHOTOS" / name).mkdir(parents=True)
        for i in range(50):
            side = generator.integers(150, 350)
            top, left = (generator.integers(0, length - side) for length in picture.shape[:2])
            crop = Image.fromarray(picture[top : top + side, left : left + side])
            crop.save(tmp_path / "PHOTOS" / name / f"IMG_{i:04}.jpg")
    Image.fromarray(load_sample_images().images[1]).save(tmp_path / "photo.jpg")
    return tmp_path


@pytest.mark.slow  # a dozen programs, four of them training
def test_the_page_leads_from_a_folder_to_a_named_picture(user):
    environment = {**os.environ, "PYTHON": PYTHON, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    said = {}
    for command in commands_in(PAGE):
        words = [PYTHON if word == "python" else word for word in command.words]
        settings = {**environment, **dict(command.settings)}
        done = subprocess.run(words, cwd=user, env=settings, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command.text}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
        said[command.text] = done.stdout
    training = next(text for text in said if text == "CONFIG=photos.yaml bash pretrain.sh --pretrained FILE.pth")
    assert "head: 10 classes in the file, 2 here; starts anew" in said[training]
    assert "learning rate 2.000e-04 (1 × 2.000e-04)" in said[training]
    result = json.loads((user / "output" / "photos" / "default" / "eval_val.json").read_text())["result"]
    assert result["images"] == 20 and result["top1"] >= 90 and result["macro_f1"] >= 90
    predicted = next(text for name, text in said.items() if "predict.py" in name)
    assert re.search(r"photo.jpg\n +[\d.]+ %  flower\n", predicted)
    assert len(said) >= 9


def test_what_the_page_says_of_the_configuration_stands_in_it():
    file = str(ROOT / "configs" / "finetune.yaml")
    own = load_config(file)
    rows = [line.split("|") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    stated = [pair for row in rows for pair in re.findall(r"`((?:[A-Z]+[.])+[A-Z_]+) ([^`]+)`", row[2])]
    assert len(stated) > 12
    for key, value in stated:
        assert load_config(file, [key, value]) == own, f"{key} {value}"
