"""The Triton kernels compiled ahead of time for two GPUs that need not be there: what they take, and what they hold.

pytest tests/test_compiled_kernels.py
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterable

import pytest
import torch
import triton
from conftest import ROOT

from benchmarks.common import RESULTS
from benchmarks.kernels import count_instructions, estimate
from models.ops.linear_attention.triton_op import (
    RESIDENT_PROGRAMS,
    SHARED_MEMORY,
    SHARED_MEMORY_OF_MAPS,
    parts_of_a_sum,
)

# Bytes of shared memory a program may take, and registers a thread may hold.
ATTENTION = ("--kernels", "state", "output", "query_backward", "key_backward")  # without the convolution
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
REGISTER_LIMIT = 255
# Bytes of stack, known and named in the op's README; nothing else spills at up to 64 channels.
SPILLS = {
    (80, "float32", 8, "query_backward"): 8,
    (90, "bfloat16", 40, "query_backward"): 32,
    (90, "bfloat16", 64, "query_backward"): 16,
}


def _compile(architectures: Iterable[int], channels: Iterable[int], dtypes: Iterable[str], *flags: str) -> list[dict]:
    """In a process of its own: the tests' process imports the kernels for the interpreter."""
    command = [sys.executable, "-m", "benchmarks.kernels", "--records", *flags, "--dtypes", *dtypes]
    command += ["--architectures", *map(str, architectures), "--channels", *map(str, channels)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
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
        assert record["stack"] <= allowed and record["local"] == 0, f"{record}"
        assert allowed or record["spill_accesses"] == 0, f"{record}"
    # the others return the number beside a NaN, which the interpreter does not show
    assert record["maxima"] and all(".NAN" in name for name in record["maxima"]), f"NaN is swallowed: {record}"
    kinds = {"BF16" if "BF16" in name else "TF32" if "TF32" in name else name for name in record["products"]}
    expected = {"bfloat16": {"BF16"}, "float16": {"TF32"}, "float32": set()}[dtype]  # float32 is multiplied exactly
    assert kinds == expected, f"wrong products on tensor cores: {record}"


# Slow: the same kernels for a second GPU, and below them with other constants.
@pytest.mark.parametrize("architecture", [pytest.param(80, marks=pytest.mark.slow), 90])
def test_bfloat16_kernels_fit_their_gpu_without_spilling(architecture):
    records = _compile([architecture], [32, 64], ["bfloat16"], "--mask", *ATTENTION)
    assert len(records) == 8
    for record in records:
        _check(record)
    hopper = sum("HGMMA" in " ".join(record["products"]) for record in records)
    assert hopper == (5 if architecture == 90 else 0)  # Hopper's own, where tiles are wide enough


# Of query_backward in bfloat16: sums of two sets of features, and tiles turned, take more than a thread has.
SPILLS_OF_MAPS = {("growth", 32): 24, ("growth", 64): 248, ("norm", 32): 0, ("norm", 64): 0}


@pytest.mark.parametrize(
    ("feature_map", "kernels"),
    [
        ("norm", ["output"]),
        *(pytest.param(name, [], marks=pytest.mark.slow, id=f"{name}-all") for name in ("growth", "norm")),
    ],
)
def test_other_maps_fit_their_gpu(feature_map, kernels):
    flags = ["--map", feature_map, *(["--kernels", *kernels] if kernels else ATTENTION)]
    for record in _compile([90], [32, 64], ["bfloat16"], *flags):
        channels = record["channels"]
        allowed = SPILLS_OF_MAPS[feature_map, channels] if record["kernel"] == "query_backward" else 0
        assert record["stack"] <= allowed, record
        assert record["shared"] <= SHARED_MEMORY_OF_MAPS[feature_map][channels], record


@pytest.mark.slow
def test_sizes_of_one_which_the_launcher_makes_constants_compile_too():
    assert len(_compile([90], [32], ["float32"], "--mask", "--ones", *ATTENTION)) == 4


@pytest.mark.slow
def test_the_convolution_and_the_gate_fit_their_gpu():
    for record in _compile(
        [80, 90, 100], [16, 32, 64, 96], ["bfloat16", "float32"], "--kernels", "local", "local_backward"
    ):
        assert record["stack"] <= 8, record
        assert record["shared"] <= SHARED_LIMIT[80], record


@pytest.mark.slow
def test_every_type_and_size_fits_its_gpu():
    records = _compile([80, 90], [8, 24, 32, 40, 64, 96, 128], ["bfloat16", "float16", "float32"], "--mask", *ATTENTION)
    assert len(records) == 2 * 7 * 3 * 4
    for record in records:
        _check(record)


# ---------------------------------------------------------------------------------------------------------------------
# What benchmarks/kernels.py reads and estimates
# ---------------------------------------------------------------------------------------------------------------------


KEY = ("kernel", "architecture", "channels", "dtype")


def _stored() -> dict[tuple, dict]:
    files = sorted(RESULTS.glob(f"kernels-triton-{triton.__version__}-*.json"), key=lambda path: path.name[-15:])
    if not files:
        pytest.skip(f"no figures of Triton {triton.__version__}: python -m benchmarks.kernels writes them")
    return {tuple(record[key] for key in KEY): record for record in json.loads(files[-1].read_text())["kernels"]}


@pytest.mark.parametrize(
    ("architectures", "channels", "flags"),
    [
        ([90], [32], ["--kernels", "state"]),
        ([100], [64], ["--kernels", "state"]),  # which did not compile in two stages
        pytest.param([80, 90, 100], [32, 64], [], marks=pytest.mark.slow, id="all"),
    ],
)
def test_machine_code_is_no_worse_than_the_figures_kept_for_this_triton(architectures, channels, flags):
    stored = _stored()
    for record in _compile(architectures, channels, ["bfloat16"], *flags):
        kept = stored[tuple(record[key] for key in KEY)]
        for name in ("instructions_per_element", "special_per_element", "barriers", "stack", "spill_accesses"):
            assert record[name] <= kept[name], f"more {name} than {kept[name]}: {record}"
        assert record["programs"] * record["warps"] >= kept["programs"] * kept["warps"], record


def test_the_launcher_knows_how_many_programs_a_multiprocessor_holds():
    stored = _stored()
    for kernel, resident in RESIDENT_PROGRAMS.items():
        name = kernel.__name__.removesuffix("_kernel")
        assert all(stored[name, 90, channels, "bfloat16"]["programs"] == resident[channels] for channels in (32, 64))


@pytest.mark.parametrize(
    ("tokens", "sequences", "slots", "parts"),
    [
        (3136, 384, 396, 1),  # 0.97 of a wave
        (3136, 384, 264, 2),  # 1.45 waves would take as long as 2: 2.9 of half the length
        (65536, 2, 132, 66),  # few long sequences fill the device
        (300, 1, 132, 1),  # too short to be split
        (1, 1, 132, 1),
    ],
)
def test_sequences_are_split_so_that_programs_fill_their_waves(tokens, sequences, slots, parts):
    assert parts_of_a_sum(tokens, sequences, slots) == parts


CODE = """
        /*0000*/                   MUFU.RCP R0, R5 ;                 /* 0x0 */
                                                                     /* 0x0 */
        /*0010*/              @!P0 BRA 0x60 ;                        /* 0x0 */
        /*0020*/                   MUFU.EX2 R0, R1 ;                 /* 0x0 */
        /*0030*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;     /* 0x0 */
        /*0040*/             @!UP1 HMMA.16816.F32.BF16 R0, R1, R2 ;  /* 0x0 */
        /*0050*/              @!P0 BRA 0x20 ;                        /* 0x0 */
        /*0060*/                   FMNMX.NAN R1, R2, RZ, !PT ;       /* 0x0 */
        /*0070*/                   STL [R1], R2 ;                    /* 0x0 */
        /*0080*/                   BRA 0x80;                         /* 0x0 */
"""


def test_instructions_are_counted_in_the_loop_and_outside():
    """The last branch, to itself, is what fills code up."""
    assert count_instructions(CODE) == {
        "loop": 4, "outside": 5, "inner": 0, "special": 1, "barriers": 1, "products": {"HMMA.16816.F32.BF16": 1},
        "spill_accesses": 1, "maxima": ["FMNMX.NAN"],
    }  # fmt: skip


def test_an_estimate_is_the_largest_of_three_limits():
    """132 programs, one on each multiprocessor: 4 warps fill one of the 4 slots of a cycle."""
    record = {
        "kernel": "output", "architecture": 90, "channels": 32, "dtype": "bfloat16", "tile": 64, "warps": 4,
        "programs": 2, "loop": 300, "outside": 200, "special": 10,
    }  # fmt: skip
    found = estimate(record, (132, 256, 1, 32))  # parts of four tiles
    assert found["limit"] == "issue" and found["waves"] == 0.5
    assert found["seconds"] == pytest.approx((200 + 4 * 300) * 4 / 1 / 1.83e9)
    assert found["floor"] == pytest.approx(2 * 132 * 256 * 32 * 2 / 4.3e12)
    assert estimate(record | {"special": 700}, (132, 256, 1, 32))["limit"] == "special"
    assert estimate(record | {"loop": 1, "outside": 1, "special": 0}, (132, 256, 1, 32))["limit"] == "memory"
