"""Trackers: what they are told, and that none stops or slows a run.

pytest tests/test_tracking.py
"""

import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import ROOT, folder_of, run

import main
from config import ConfigError, load_config
from engine import tracking
from logger import read_metrics
from utils.faults.preemption import Preempted

SHORT = "TRAIN.EPOCHS 2 TRAIN.WARMUP_EPOCHS 0 PRINT_FREQ 5"


class Told:
    """A tracker that notes what it is told; `refuses` decides which calls raise or hang."""

    calls: list[tuple] = []  # noqa: RUF012 (shared on purpose: a run makes its own tracker)
    threads: set[str] = set()  # noqa: RUF012
    refuses = staticmethod(lambda method: None)

    def _take(self, method, *arguments):
        self.threads.add(threading.current_thread().name)
        self.refuses(method)
        self.calls.append((method, *arguments))

    def start(self, folder, config, run_id):
        self._take("start", folder, config, run_id)
        return run_id or "id-7"

    def log(self, values, step):
        self._take("log", values, step)

    def finish(self, report):
        self._take("finish", report)


@pytest.fixture(autouse=True)
def told(monkeypatch):
    monkeypatch.setattr(Told, "calls", [])
    monkeypatch.setattr(Told, "threads", set())
    return Told


TRACKED = f"TRACKER {__name__}:Told"


def test_a_tracker_is_told_what_metrics_jsonl_gets_the_configuration_and_the_result(tiny, told):
    run(tiny, f"{SHORT} {TRACKED} EMA.ENABLE True EMA.WARMUP True")
    (start, *logged, finish), folder = told.calls, folder_of(tiny)
    assert start[:2] == ("start", str(folder)) and start[2]["TRAIN"]["EPOCHS"] == 2 and start[3] is None
    expected = []
    for record in read_metrics(folder / "metrics.jsonl"):
        kind, step = record["kind"], record["step"]
        values = {f"{kind}/{name}": each for name, each in record.items() if name not in ("kind", "epoch", "step")}
        expected.append(("log", values, step))
    assert logged == expected and {next(iter(values)).partition("/")[0] for _, values, _ in logged} == {
        "train",
        "val",
        "ema",
    }
    best = {kind: max(v[f"{kind}/top1"] for _, v, _ in logged if f"{kind}/top1" in v) for kind in ("val", "ema")}
    (report,) = finish[1:]
    assert report["finished"] and report["epochs"] == 2 and report["folder"] == str(folder)
    assert {kind: report[f"best/{kind}/top1"] for kind in best} == best
    assert told.threads == {"tracker"}


def test_a_resumed_run_continues_the_trackers_run_and_a_new_one_does_not(tiny, told, monkeypatch):
    run(tiny, f"TRAIN.EPOCHS 1 TRAIN.WARMUP_EPOCHS 0 {TRACKED}")
    assert json.loads((folder_of(tiny) / "tracker.json").read_text()) == {
        "tracker": TRACKED.split()[1],
        "id": "id-7",
    }
    run(tiny, f"{SHORT} {TRACKED}")
    run(tiny, f"{SHORT} {TRACKED} TRAIN.AUTO_RESUME False")
    run(tiny, f"{SHORT} {TRACKED} TAG other")
    assert [call[3] for call in told.calls if call[0] == "start"] == [None, "id-7", None, None]
    (folder_of(tiny) / "tracker.json").write_text("[")  # damaged: another run of the tracker, and no error
    run(tiny, f"{SHORT} {TRACKED} TRAIN.EPOCHS 3")
    assert [call[3] for call in told.calls if call[0] == "start"][-1] is None


def test_a_run_that_is_told_to_stop_says_that_it_is_not_finished(tiny, told, monkeypatch):
    monkeypatch.setattr(main, "validate_epoch", lambda *arguments: (_ for _ in ()).throw(Preempted("told to stop")))
    with pytest.raises(Preempted):
        run(tiny, f"{SHORT} {TRACKED}")
    assert told.calls[-1][0] == "finish" and not told.calls[-1][1]["finished"] and told.calls[-1][1]["epochs"] == 0


def test_what_a_tracker_refuses_for_a_while_comes_later_in_order_with_one_warning(tiny, told, monkeypatch, log):
    attempts = []

    def refuse(method):
        attempts.append(method)
        if len(attempts) < 4:
            raise ConnectionError("the server is down")

    monkeypatch.setattr(told, "refuses", staticmethod(refuse))
    monkeypatch.setattr(tracking, "PAUSE", 0.0)
    run(tiny, f"{SHORT} {TRACKED}")
    assert [call[0] for call in told.calls] == ["start", *["log"] * 8, "finish"]
    assert log.text.count("could not be written") == 1 and "best top-1" in log.text
    assert f"the tracker {TRACKED.split()[1]} could not be written: ConnectionError: the server is down" in log.text


@pytest.mark.parametrize("problem", [RuntimeError("no"), SystemExit(1), MemoryError()])
def test_a_tracker_that_raises_whatever_it_is_costs_one_warning_and_few_attempts(tiny, told, monkeypatch, log, problem):
    attempts = []

    def refuse(method):
        attempts.append(method)
        raise problem

    monkeypatch.setattr(told, "refuses", staticmethod(refuse))
    run(tiny, f"{SHORT} {TRACKED}")
    assert attempts == ["start", "start"]  # at the beginning, and once more at the end
    assert log.text.count("could not be written: ") == 1 and "lacks 10 records" in log.text and "best top-1" in log.text


def test_a_tracker_that_hangs_holds_neither_the_run_nor_its_end(tiny, told, monkeypatch, log):
    release = threading.Event()
    assert not tracking.hangs()
    monkeypatch.setattr(told, "refuses", staticmethod(lambda method: release.wait()))
    monkeypatch.setattr(tracking, "PATIENCE", 0.2)
    run(tiny, f"{SHORT} {TRACKED}")
    assert tracking.hangs()  # so that main.py ends at once, whatever the tracker's library does at the end
    release.set()
    assert "gave no answer within 0.2 s: the run ends without it" in log.text and "best top-1" in log.text
    assert len(read_metrics(folder_of(tiny) / "metrics.jsonl")) == 8


WRONG = {
    "ending_tracker:Class": "TRACKER ending_tracker:Class cannot be imported (SystemExit: 3); its module",
    "absent_module:Class": "cannot be imported (ModuleNotFoundError: No module named 'absent_module'); its module",
    "json:Tracker": "TRACKER json:Tracker cannot be imported (AttributeError",
    "json:JSONDecoder": "TRACKER json:JSONDecoder lacks start, log, finish of its methods start, log, finish",
    "wandb": "TRACKER is wandb, which is not installed: `pip install wandb`, or set TRACKER none",
    "mlflow": "TRACKER is 'mlflow' (str), expected none, wandb, or MODULE:CLASS",
}


@pytest.mark.parametrize(("name", "message"), WRONG.items(), ids=WRONG)
def test_a_tracker_that_cannot_be_used_is_noticed_before_anything_starts(tiny, name, message, monkeypatch):
    monkeypatch.setattr(tracking, "find_spec", lambda module: None)
    (tiny.parent / "ending_tracker.py").write_text("raise SystemExit(3)\n")
    monkeypatch.syspath_prepend(tiny.parent)
    with pytest.raises(ConfigError, match=re.escape(message)):
        main.check(load_config(str(tiny), ["TRACKER", name]))
    if name != "mlflow":
        main.check(load_config(str(tiny), ["TRACKER", name, "EVAL_MODE", "True", "MODEL.RESUME", "x.pth"]))


def test_a_program_whose_tracker_hangs_at_its_end_too_ends(tiny):
    """Its library waits in a thread of its own and at the interpreter's exit, as wandb does without its server."""
    code = (
        "import atexit, threading, time\n"
        "class Hanging:\n"
        "    def start(self, folder, config, run_id):\n"
        "        atexit.register(time.sleep, 600)\n"
        "        threading.Thread(target=time.sleep, args=(600,)).start()\n"
        "        time.sleep(600)\n"
        "    log = finish = start\n"
    )
    (tiny.parent / "hanging_tracker.py").write_text(code)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tiny.parent)}
    patience = (
        "import engine.tracking, runpy; engine.tracking.PATIENCE = 0.5; runpy.run_path('main.py', run_name='__main__')"
    )
    command = [sys.executable, "-c", patience, "--cfg", str(tiny), "--opts", "TRAIN.EPOCHS=1", "TRAIN.WARMUP_EPOCHS=0"]
    result = subprocess.run(
        [*command, "TRACKER=hanging_tracker:Hanging"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0 and "gave no answer within 0.5 s" in result.stdout and "best top-1" in result.stdout


def test_only_rank_0_has_a_tracker(tiny, told, monkeypatch):
    real = main.RunFiles

    def as_rank_1(*arguments):
        with monkeypatch.context() as patched:
            patched.setattr("engine.monitoring.distributed.rank", lambda: 1)
            return real(*arguments)

    monkeypatch.setattr(main, "RunFiles", as_rank_1)
    run(tiny, f"TRAIN.EPOCHS 1 TRAIN.WARMUP_EPOCHS 0 {TRACKED}")
    assert told.calls == [] and not (folder_of(tiny) / "metrics.jsonl").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Real ones
# ---------------------------------------------------------------------------------------------------------------------


def test_wandb_offline_gets_a_run_and_its_continuation_under_one_id(tiny, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run(tiny, "TRAIN.EPOCHS 1 TRAIN.WARMUP_EPOCHS 0 TRACKER wandb")
    folder = folder_of(tiny)
    run_id = json.loads((folder / "tracker.json").read_text())["id"]
    run(tiny, f"{SHORT} TRACKER wandb")
    assert json.loads((folder / "tracker.json").read_text())["id"] == run_id
    files = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2 and all(file.name == f"run-{run_id}.wandb" for file in files)
    content = b"".join(file.read_bytes() for file in files)
    for word in (b"train/loss", b"val/top1", b"best/val/top1", b"DROP_PATH_RATE"):
        assert word in content


def documented_tracker() -> str:
    """The example of docs/training.md, which is ten lines."""
    text = (ROOT / "docs" / "training.md").read_text()
    example = next(each for each in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "import mlflow" in each)
    assert len([line for line in example.splitlines() if line.strip()]) <= 12
    return example


def test_the_documented_tracker_of_mlflow_fills_a_file_store(tiny, tmp_path, monkeypatch):
    import mlflow

    (tmp_path / "mlflow_tracker.py").write_text(documented_tracker())
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # its newest versions prefer a database
    mlflow.set_tracking_uri(f"file:{tmp_path}/store")
    run(tiny, "TRAIN.EPOCHS 1 TRAIN.WARMUP_EPOCHS 0 TRACKER mlflow_tracker:MLflowTracker")
    run(tiny, f"{SHORT} TRACKER mlflow_tracker:MLflowTracker")
    folder = folder_of(tiny)
    client = mlflow.MlflowClient()
    (found,) = client.search_runs([each.experiment_id for each in client.search_experiments()])
    assert found.info.run_id == json.loads((folder / "tracker.json").read_text())["id"]
    assert found.info.status == "FINISHED" and found.info.run_name == str(folder)
    history = client.get_metric_history(found.info.run_id, "train/loss")
    records = [each for each in read_metrics(folder / "metrics.jsonl") if each["kind"] == "train"]
    assert [(each.step, each.value) for each in history] == [(r["step"], r["loss"]) for r in records]
    names = {Path(each.path).name for each in client.list_artifacts(found.info.run_id)}
    assert {"config.json", "report.json"} <= names
