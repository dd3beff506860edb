"""All that a GPU has to show, in one command of at most eight minutes: python -m benchmarks.gpu.

The tests that need a GPU come first, then the operation in two precisions and over the sequence length, training steps
of whole models beside timm's, and a real training run in bfloat16. Each is a program in a process of its own and with a
limit; what it wrote, or why it wrote nothing, is gathered in one file. `--device cpu` rehearses it with tiny sizes.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.common import ROOT, Bar, Outcome
from logger import read_metrics

SIZES = {
    "cuda": {
        "shapes": "128,3136,3,32 128,784,6,32 128,3136,1,64",
        "lengths": "49 256 1024 4096 16384 65536",
        "models": "--models pola_swin_t pola_pvt_t pola_pp_b2 nalaformer_t --batch-size 64",
        "training": "",
        "kernel_tests": "tests/test_gated.py tests/test_triton_maps.py",
    },
    "cpu": {
        "shapes": "1,49,1,8",
        "lengths": "49",
        "models": "--models pola_pvt_t --batch-size 1 --image-size 32 --repeats 1",
        "kernel_tests": "tests/test_gated.py -k launches",
        "training": "--opts TRAIN.EPOCHS 1 TRAIN.WARMUP_EPOCHS 0",
    },
}


@dataclass(frozen=True)
class Step:
    """A program, its arguments with {names} of SIZES and of folders, and how many seconds it may take."""

    name: str
    command: str
    seconds: float


ATTENTION = "-m benchmarks.attention --device {device} --shapes {shapes} --lengths {lengths} --output {out} --dtype"
MODEL_STEP = "-m benchmarks.model_step --device {device} {models} --timm-sizes --output {out}"
STEPS = [
    Step("tests", "-m pytest -q -m gpu tests/test_gpu.py", 100),
    Step("tests of kernels", "-m pytest -q {kernel_tests}", 60),
    Step("operation, bfloat16", f"{ATTENTION} bfloat16", 90),
    Step("operation, float32", f"{ATTENTION} float32", 60),
    Step("layers", "-m benchmarks.attention_layer --device {device} --output {out}", 30),
    Step("training steps", f"{MODEL_STEP} --precision bfloat16 float32", 120),
    Step("training run", "main.py --cfg configs/quickstart.yaml --output {out} --tag run --amp {training}", 70),
]


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    common.run(options, measure, recorded="seconds")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = common.argument_parser("gpu", __doc__, device=True)
    parser.add_argument("--seconds", type=float, default=480, help="of all together; what comes later is left out")
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace) -> Outcome:
    """Every step as long as there is time, then one table."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary)
        records = {}
        for step in STEPS:
            left = options.seconds - (time.monotonic() - started)
            records[step.name] = run_step(step, options.device, out, min(step.seconds, left))
        pictures = {path.name: path.read_bytes() for path in sorted(out.glob("attention-bfloat16-*.png"))}
    bars = [
        Bar(*(bar[name] for name in ("what", "measured", "bound", "direction")))
        for record in records.values()
        for bar in (record["result"] or {}).get("bars", [])
    ]
    print_table(records)

    def draw(path: Path) -> None:
        for picture in pictures.values():
            path.write_bytes(picture)

    return Outcome({"steps": records}, bars, draw if pictures else None)


def run_step(step: Step, device: str, out: Path, seconds: float) -> dict[str, Any]:
    """How it ended, its time, its last lines, and what it wrote; nothing is started without time."""
    record: dict[str, Any] = {"ended": "left out: no time was left", "seconds": 0.0, "last_lines": [], "result": None}
    if seconds <= 0:
        return record
    print(f"\n== {step.name}", flush=True)
    words = step.command.format(device=device, out=out, **SIZES[device]).split()
    before, start = set(out.glob("*.json")), time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=seconds)
        record["ended"] = "finished" if process.returncode == 0 else f"exit code {process.returncode}"
    except subprocess.TimeoutExpired:
        _end(process)
        output, _ = process.communicate()
        record["ended"] = f"ended after {seconds:.0f} s"
    except BaseException:  # Ctrl-C does not reach another session
        _end(process)
        raise
    record["seconds"] = round(time.monotonic() - start, 1)
    record["last_lines"] = [line for line in output.replace(str(out), "OUT").splitlines() if line.strip()][-3:]
    print(output, end="", flush=True)
    if written := sorted(set(out.glob("*.json")) - before):
        with suppress(json.JSONDecodeError):  # ended while it was written
            record["result"] = json.loads(written[-1].read_text())
    elif metrics := sorted(out.glob("*/run/metrics.jsonl")):
        validations = [each for each in read_metrics(metrics[-1]) if each["kind"] == "val"]
        record["result"] = {"top1": [each["top1"] for each in validations]}
    return record


def _end(process: subprocess.Popen[str]) -> None:
    """With all that it has started, which would hold its output open."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def print_table(records: dict[str, dict[str, Any]]) -> None:
    rows = []
    for name, record in records.items():
        result = record["result"] or {}
        said = [f"top-1 {result['top1'][-1]:.2f} %"] if result.get("top1") else []
        said += [
            f"{step['side']} {model['model']} {step['precision']}: {step['step_ms']['median']:.1f} ms"
            for model in result.get("steps", [])
            for step in model["contenders"]
            if step["side"] != "baseline"
        ]
        said += [f"{bar['what']}: {bar['measured']:.2f}" for bar in result.get("bars", [])]
        rows += [(name, f"{record['ended']}, {record['seconds']:.0f} s", "")]
        rows += [("", "", line) for line in said or record["last_lines"][-1:]]
    common.print_table("What the GPU has shown", ("step", "ended", "figure"), rows)


if __name__ == "__main__":
    main()
