"""What a run says about its time: waiting for data, waiting for other processes, computing; and the profile.

pytest tests/test_bottleneck.py
"""

import json
import re
import time

import pytest
from conftest import folder_of, run, run_main

import data.loaders
from engine.bottleneck import Times, verdict
from logger import read_metrics


def test_what_bounds_a_run_and_what_to_change(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    slow_data = verdict(Times(step=100.0, data=71.0, communication=3.0, images=160_000), workers=8, processes=4)
    assert slow_data.startswith("data-bound: 71% waiting; 8 workers give 1,600 images/s: more DATA.NUM_WORKERS (")
    assert "DATA.NUM_WORKERS" not in verdict(Times(1.0, 0.9, 0.0, 1), workers=16, processes=1)
    sequences = verdict(Times(10.0, 9.0, 0.0, 160), workers=16, processes=1, noun="samples")
    assert sequences == "data-bound: 90% waiting; 16 workers give 16 samples/s"
    slow_network = verdict(Times(step=100.0, data=5.0, communication=40.0, images=1000), workers=8, processes=4)
    assert slow_network.startswith("communication-bound: 40% waiting for the other 3 processes, 10 images/s")
    fine = verdict(Times(step=100.0, data=5.0, communication=3.0, images=1000), workers=8, processes=4)
    assert fine.startswith("compute-bound: 92% computing")


def test_a_slow_loader_is_called_data_bound(tiny, monkeypatch, log):
    collate = data.loaders._collate

    def slow(samples):
        time.sleep(0.6)  # ten times what a step takes on a machine with nothing else to do
        return collate(samples)

    monkeypatch.setattr(data.loaders, "_collate", slow)
    run(tiny, "TRAIN.EPOCHS 1 DATA.BATCH_SIZE 128")
    share = int(re.search(r"epoch 0 data-bound: (\d+)% waiting; loading in the main process give", log.text)[1])
    record = next(r for r in read_metrics(folder_of(tiny) / "metrics.jsonl") if r["kind"] == "train")
    assert share >= 40 and record["data_time"] >= 0.6 and record["communication_time"] == 0


def test_two_processes_measure_what_their_exchange_costs(tiny):
    run_main("--cfg", tiny, "--opts", "TRAIN.EPOCHS", "1", "PRINT_FREQ", "11", processes=2)
    records = [r for r in read_metrics(folder_of(tiny) / "metrics.jsonl") if r["kind"] == "train"]
    assert all(0 < r["communication_time"] < r["step_time"] for r in records)
    assert all(r["communication_time"] + r["data_time"] < r["step_time"] for r in records)


@pytest.mark.parametrize("steps", [3])
def test_profile_traces_so_many_steps(tiny, steps, log):
    run(tiny, f"TRAIN.EPOCHS 1 PROFILE {steps}")
    trace = json.loads((folder_of(tiny) / "trace_rank_0.json").read_text())
    names = [event.get("name", "") for event in trace["traceEvents"]]
    assert len({name for name in names if name.startswith("ProfilerStep#")}) == steps
    assert any("aten::" in name for name in names) and f"profile of {steps} steps" in log.text
