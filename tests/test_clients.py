"""The table of clients in docs/models.md: what each row says is what happens.

pytest tests/test_clients.py; other people's packages are installed into a temporary folder first.
"""

import importlib
import os
import re
import subprocess
import sys

import pytest
from clients import CLIENTS, SIZES
from conftest import ROOT

# Rows that other files test.
ELSEWHERE = {
    "`torch.jit.trace`; `torch.onnx.export(dynamo=False)` and onnxruntime 1.32": (
        "test_export.test_torchscript_graphs_follow_their_input_at_any_batch"
    ),
    "`model.half()`, `.bfloat16()`, on a CPU too; `create_model(dtype=…)`": (
        "test_timm.test_a_model_in_half_precision_computes_and_trains_on_a_cpu"
    ),
    'a start on the meta device: `to_empty`, `create_model(device="meta")`, `load_state_dict(assign=True)`': (
        "test_timm.test_buffers_that_no_file_holds_are_right_after_any_beginning"
    ),
    "a second copy of the models in the process (`import models` and `import polaformer`)": (
        "test_wheel.test_two_copies_in_a_process_register_once_and_warn_once"
    ),
    "`torch.func` (`functional_call`, `grad`, `vmap`, `jvp`, `jacrev`, `jacfwd`, `hessian`), forward-mode AD": (
        "test_model_derivatives.test_models_have_the_derivatives_of_torch_func"
    ),
    "`create_feature_extractor` of timm and torchvision (`torch.fx`)": (
        "test_timm.test_feature_extractors_by_torch_fx"
    ),
}


def rows() -> list[str]:
    """The first cell of every row of the table."""
    text = (ROOT / "docs" / "models.md").read_text().split("## In other programs")[1]
    return [line.split(" | ")[0].removeprefix("| ") for line in text.splitlines() if line.startswith("| ")][1:]


def test_every_row_is_tested_and_names_the_version():
    assert sorted(rows()) == sorted([*CLIENTS, *ELSEWHERE])
    for place in ELSEWHERE.values():
        file, test = place.split(".")
        assert callable(getattr(importlib.import_module(file), test))
    for row, client in CLIENTS.items():
        named = [name for name in re.findall(r"[a-z]\w+ \d[\d.]*\d", row) if not name.startswith("torch ")]
        pinned = [package.replace("==", " ") for package in client.packages]
        assert bool(named) == bool(pinned) and all(any(pin.startswith(name) for pin in pinned) for name in named), row


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """A folder with the packages of all clients, as pinned, without what they need in turn: the tests have it."""
    folder = tmp_path_factory.mktemp("library")
    packages = [package for client in CLIENTS.values() for package in client.packages]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *packages]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        reason = next(line for line in result.stderr.splitlines() if line.startswith("ERROR"))
        unreachable = "from versions: none" in reason
        (pytest.skip if unreachable else pytest.fail)(f"cannot install: {reason}")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("row", [row for row, client in CLIENTS.items() if client.packages])
def test_a_package_does_what_its_row_says(row, library):
    command = [sys.executable, ROOT / "tests" / "clients.py", row]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{library}{os.pathsep}{ROOT}"}
    result = subprocess.run(command, cwd=library, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("row", [row for row, client in CLIENTS.items() if not client.packages])
def test_pytorch_does_what_its_row_says(row, name):
    CLIENTS[row].run(name)
