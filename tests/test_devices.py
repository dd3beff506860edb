"""Machines without an NVIDIA GPU on Linux, simulated on a CPU: other accelerators, macOS, Windows.

pytest tests/test_devices.py
"""

import math
import os
import re
import resource
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY, config_file, folder_of, run, write_tiny
from torch.utils._python_dispatch import TorchDispatchMode

import main
from config import ConfigError, load_config, make_plan, parse_command_line
from data.loaders import build_loaders
from engine.training import place
from logger import read_metrics
from models import build_model
from optimizer import build_optimizer
from tools import predict
from utils import devices, distributed
from utils.precision import autocast_dtype
from utils.randomness import generator_states, restore_generators

SHORT = "TRAIN.EPOCHS 2 TRAIN.WARMUP_EPOCHS 0"


def accelerator(monkeypatch, kind: str, count: int = 1) -> None:
    """Let torch say that there is an accelerator."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device(kind))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda index: None)


@pytest.mark.parametrize("kind", ["cuda", "mps", "xpu"])
def test_the_accelerator_that_torch_finds_is_taken_unless_another_device_is_asked_for(kind, monkeypatch):
    accelerator(monkeypatch, kind)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert distributed.init() == torch.device(kind, 0) == distributed.init(device_name=kind)
    assert distributed.init(device_name="cpu") == torch.device("cpu")
    with pytest.raises(distributed.LaunchError, match="2 processes need 2 GPUs, and this node has 1"):
        distributed.init(single_process_gpu=1)
    other = "xpu" if kind != "xpu" else "mps"
    with pytest.raises(ConfigError, match=rf"DEVICE {other} \(--device\) cannot be used here: there is {kind} and cpu"):
        main.check(load_config(config_file("quickstart"), ["DEVICE", other]))


def test_device_is_a_flag_and_its_values_are_named(capsys):
    assert parse_command_line(["--cfg", config_file("quickstart"), "--device", "cpu"]).DEVICE == "cpu"
    with pytest.raises(SystemExit):
        parse_command_line(["--cfg", config_file("quickstart"), "--device", "gpu"])
    assert "DEVICE is 'gpu' (str), expected one of auto, cpu, cuda, mps, xpu" in capsys.readouterr().err


def test_what_a_device_lacks_is_one_phrase(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.xpu, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: False)
    assert devices.lacks(torch.device("cpu")) == devices.lacks(torch.device("xpu")) == ""
    assert devices.lacks(torch.device("cuda")) == "bfloat16 (AMP_DTYPE auto is float16)"
    mps = devices.lacks(torch.device("mps"))
    assert [word for word in ("float64", "bfloat16", "page-locked", "optimizers") if word in mps] == [
        "float64",
        "bfloat16",
        "page-locked",
        "optimizers",
    ]
    assert autocast_dtype("auto", torch.device("mps")) == torch.float16 == autocast_dtype("auto", torch.device("cuda"))
    assert autocast_dtype("auto", torch.device("xpu")) == torch.bfloat16 == autocast_dtype("auto", torch.device("cpu"))


class NoFloat64(TorchDispatchMode):
    """A device that has no float64, and says so as MPS does."""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for each in result if isinstance(result, tuple | list) else (result,):
            if isinstance(each, torch.Tensor) and each.dtype == torch.float64:
                raise TypeError(f"{function}: the MPS framework doesn't support float64")
        return result


@pytest.mark.parametrize("bad", [False, True], ids=["finite", "non-finite"])
def test_a_run_without_what_mps_lacks_gives_what_the_cpu_gives(tiny, monkeypatch, log, bad):
    """float64 and fused optimizers; a step that is not finite is left out all the same."""
    options = f"{SHORT} TRAIN.NON_FINITE skip PRINT_FREQ 1 EMA.ENABLE True EMA.WARMUP True"
    real, calls = main.build_training, []

    def building(*arguments):
        training = real(*arguments)
        criterion = training.criterion
        training.criterion = lambda logits, targets: (
            criterion(logits, targets) * (math.nan if bad and len(calls) == 3 else 1.0)
            + 0.0 * len(calls.append(None) or calls)
        )
        return training

    monkeypatch.setattr(main, "build_training", building)
    run(tiny, f"{options} TAG whole")
    with pytest.raises(TypeError, match="float64"), NoFloat64():
        run(tiny, f"{options} TAG refused")
    calls.clear()
    for module in ("engine.training", "engine.epoch", "engine.non_finite", "utils.metrics"):
        monkeypatch.setattr(f"{module}.widest", lambda device: torch.float32)
    monkeypatch.setattr("optimizer.SUPPRESSING", ())
    monkeypatch.setattr(main, "lacks", lambda device: "float64 and more")
    log.clear()
    with NoFloat64():
        run(tiny, options)
    assert log.text.count("this device is used without float64 and more") == 1
    assert log.text.count("; skipped, 1 of at most 10 steps so far") == bad
    ours, theirs = (
        {(r["kind"], r["step"]): r["loss"] for r in read_metrics(folder / "metrics.jsonl")}
        for folder in (folder_of(tiny), folder_of(tiny).parent / "whole")
    )
    assert ours.keys() == theirs.keys() and ours == pytest.approx(theirs, rel=2e-3)


def test_optimizers_are_fused_where_they_can_leave_a_step_out(tiny, monkeypatch):
    for name in ("adamw", "sgd"):
        config = load_config(str(tiny), ["TRAIN.OPTIMIZER.NAME", name])
        model = place(build_model(config, 10), torch.device("cpu"))
        assert build_optimizer(config, model).defaults["fused"]
        with monkeypatch.context() as patched:
            patched.setattr("optimizer.SUPPRESSING", ())
            assert not build_optimizer(config, model).defaults["fused"]


@pytest.mark.parametrize(("kind", "pinned"), [("cuda", True), ("xpu", True), ("mps", False)])
def test_batches_are_page_locked_for_devices_that_copy_from_such(tiny, monkeypatch, kind, pinned):
    accelerator(monkeypatch, kind)
    for asked, expected in (("auto", pinned), ("cpu", False)):
        config = load_config(str(tiny), ["DEVICE", asked])
        assert build_loaders(config, make_plan(config)).train.loader.pin_memory is expected


@pytest.mark.parametrize("kind", ["cuda", "mps", "xpu"])
def test_the_generator_of_any_accelerator_is_stored_and_put_back(kind, monkeypatch):
    accelerator(monkeypatch, kind)
    put = []
    module = SimpleNamespace(get_rng_state=lambda: torch.tensor([7]), set_rng_state=put.append)
    monkeypatch.setattr(torch, "get_device_module", lambda device=None: module)
    states = generator_states()
    assert states[kind].item() == 7
    restore_generators(states)
    assert [each.item() for each in put] == [7]
    restore_generators({name: each for name, each in states.items() if name != kind})  # of a run on a CPU
    assert len(put) == 1


def test_memory_is_in_the_units_of_the_system_and_names_are_those_of_the_device(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=3 * 2**20))
    assert devices.peak_memory_mb(cpu) == 3 * 2**10  # KiB
    monkeypatch.setattr(sys, "platform", "darwin")
    assert devices.peak_memory_mb(cpu) == 3  # bytes
    monkeypatch.setitem(sys.modules, "resource", None)
    assert math.isnan(devices.peak_memory_mb(cpu))
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 2**21)
    assert devices.peak_memory_mb(torch.device("mps")) == 2
    monkeypatch.setattr(torch.accelerator, "max_memory_allocated", lambda device: 2**22)
    assert devices.peak_memory_mb(torch.device("xpu", 0)) == 4
    assert devices.described(cpu) == f"CPU ({torch.get_num_threads()} threads)"
    assert devices.described(torch.device("mps")) == "MPS"


def test_predict_names_the_devices_that_are_there(monkeypatch, capsys):
    accelerator(monkeypatch, "mps")
    assert predict._parser().get_default("device") == "mps"
    with pytest.raises(SystemExit):
        predict._parser().parse_args(["a.jpg", "--checkpoint", "F", "--device", "toaster"])
    assert "'toaster' cannot be used here: expected cpu or mps" in capsys.readouterr().err


def test_pretrain_sh_asks_for_nothing_that_the_bash_3_2_of_macos_lacks():
    """Read, not run: no such bash is here. Programs that only GNU has, and what bash 4 added."""
    text = re.sub(r"(^|\s)#.*", "", (ROOT / "pretrain.sh").read_text())
    assert not re.search(
        r"\b(nproc|readlink -f|realpath|mapfile|readarray|coproc|timeout|date -d|declare -[Agn])\b", text
    )
    assert not re.search(r"\$\{\w+[,^]|\|&|&>>|;;?&|wait -[np]|\$\{\w+@|printf -v [^ ]*\[|\[-1\]", text)
    arrays = set(re.findall(r"(\w+)=\(\)", text))
    assert not [name for name in arrays if f'"${{{name}[@]}}"' in text]  # empty ones are unset there
    used = set(re.findall(r'"\$\{(\w+)\[@\]\}"', text))
    assert used == {"arguments", "rendezvous"}  # which are never empty


WINDOWS = r"""
import os, signal, sys
for name in ("fcntl", "resource", "termios", "pwd", "grp", "tty", "pty", "syslog", "posix_ipc"):
    sys.modules[name] = None
for name in ("SIGUSR1", "SIGUSR2", "SIGHUP", "SIGALRM", "SIGKILL", "SIGQUIT", "SIGSTOP", "SIGCONT", "alarm"):
    delattr(signal, name)
real = os.open
def opened(path, *arguments, **named):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", str(path))
    return real(path, *arguments, **named)
os.open = opened
for name in ("O_DIRECTORY", "sched_getaffinity", "statvfs", "nice", "getuid", "fork", "killpg", "setsid", "mkfifo"):
    delattr(os, name)
if __name__ == "__main__":
    import multiprocessing, runpy
    multiprocessing.set_start_method("spawn")
    sys.argv = ["main.py", *sys.argv[1:]]
    runpy.run_path("main.py", run_name="__main__")
"""


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])  # spawned: seconds of imports each
def test_one_process_trains_without_what_windows_lacks(tmp_path, workers):
    tiny = write_tiny(tmp_path, TINY.replace("NUM_WORKERS: 0", f"NUM_WORKERS: {workers}, TRAIN_FRACTION: 0.3"))
    (tmp_path / "windows.py").write_text(WINDOWS)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(tmp_path / "windows.py"), "--cfg", str(tiny), "--opts", "TRAIN.EPOCHS=1"]
    result = subprocess.run(
        [*command, "TRAIN.WARMUP_EPOCHS=0"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "this system has no locks: nothing keeps a second run out of the folder" in result.stdout
    assert "best top-1" in result.stdout and "memory nan MiB" in result.stdout
    assert "Traceback" not in result.stdout + result.stderr
    (record,) = [r for r in read_metrics(folder_of(tiny) / "metrics.jsonl") if r["kind"] == "val"]
    assert record["top1"] > 0
