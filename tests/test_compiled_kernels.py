"""The Triton kernels compiled ahead of time for two GPUs that need not be there: what they take, and what they hold.

pytest tests/test_compiled_kernels.py
"""

import json
import subprocess
import sys
from collections.abc import Iterable

import pytest
import torch
from conftest import ROOT

from models.ops.polarity_attention.triton_op import SHARED_MEMORY

# Bytes of shared memory a program may take, and registers a thread may hold.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
REGISTER_LIMIT = 255
# Bytes of stack, known and named in the op's README; nothing else spills at 32 and 64 channels, and other numbers up to
# 64, whose masks take registers too, spill this much at most, only in query_backward_kernel in float16 and float32.
PADDED_SPILL = 96
SPILLS = {(80, "float16", 64, "query_backward_kernel"): 64}


def _compile(architectures: Iterable[int], channels: Iterable[int], dtypes: Iterable[str], *flags: str) -> list[dict]:
    command = [sys.executable, "tests/compiled_kernels.py", *flags, "--dtypes", *dtypes]
    command += ["--architectures", *map(str, architectures), "--channels", *map(str, channels)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def _check(record: dict) -> None:
    architecture, dtype, channels, kernel = (record[key] for key in ("architecture", "dtype", "channels", "kernel"))
    table = SHARED_MEMORY[getattr(torch, dtype)][32 if channels <= 32 else 64 if channels <= 64 else 128]
    assert record["shared"] <= table, f"{kernel} takes {record['shared']} bytes, dispatch believes {table}"
    if table <= SHARED_LIMIT[architecture]:  # elsewhere dispatch takes the eager backend
        assert record["shared"] <= SHARED_LIMIT[architecture]
    assert 0 < record["registers"] <= REGISTER_LIMIT
    if channels <= 64:
        allowed = SPILLS.get((architecture, dtype, channels, kernel), 0)
        if channels not in (32, 64) and kernel == "query_backward_kernel" and dtype != "bfloat16":
            allowed = PADDED_SPILL
        assert record["stack"] <= allowed and record["local"] == 0, f"{record}"
        assert allowed or record["local_accesses"] == 0, f"{record}"
    # the others return the number beside a NaN, which the interpreter does not show
    assert record["maxima"] and all(".NAN" in name for name in record["maxima"]), f"NaN is swallowed: {record}"
    if dtype == "bfloat16":
        assert record["tensor_core"] and record["types"] == ["BF16"], f"no bfloat16 tensor-core products: {record}"
    if dtype == "float16":
        assert record["types"] == ["TF32"], f"float16 is not multiplied in TF32: {record}"
    if dtype == "float32":
        assert not record["tensor_core"], f"float32 is not multiplied exactly: {record}"


# Slow: the same kernels for a second GPU, and below them with other constants.
@pytest.mark.parametrize("architecture", [pytest.param(80, marks=pytest.mark.slow), 90])
def test_bfloat16_kernels_fit_their_gpu_without_spilling(architecture):
    records = _compile([architecture], [32, 64], ["bfloat16"])
    assert len(records) == 8
    for record in records:
        _check(record)
    hopper = sum("HGMMA" in record["tensor_core"] for record in records if record["channels"] == 32)
    assert hopper >= 3 if architecture == 90 else hopper == 0  # it multiplies with its own instructions


@pytest.mark.slow
def test_sizes_of_one_which_the_launcher_makes_constants_compile_too():
    assert len(_compile([90], [32], ["float32"], "--ones")) == 4


@pytest.mark.slow
def test_every_type_and_size_fits_its_gpu():
    records = _compile([80, 90], [8, 24, 32, 40, 64, 96, 128], ["bfloat16", "float16", "float32"])
    assert len(records) == 2 * 7 * 3 * 4
    for record in records:
        _check(record)
