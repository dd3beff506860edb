"""What a run says about its time: waiting for data, waiting for other processes, computing; and the profile.

pytest tests/test_bottleneck.py
"""

import json
import re
import time

import pytest
import yaml
from conftest import config_file, folder_of, run, run_main
from PIL import Image

import config
import data.loaders
import engine.bottleneck
from config import config_from_tree, load_config, make_plan
from engine.bottleneck import Times, decoding_advice, verdict
from logger import read_metrics
from utils import environment
from utils.environment import share_of_cores


def test_what_bounds_a_run_and_what_to_change(monkeypatch):
    monkeypatch.setattr(engine.bottleneck, "share_of_cores", lambda: 16)
    slow_data = verdict(Times(step=100.0, data=71.0, communication=3.0, images=160_000), workers=8, processes=4)
    assert slow_data.startswith("data-bound: 71% waiting; 8 workers give 1,600 images/s: more DATA.NUM_WORKERS (")
    assert "DATA.NUM_WORKERS" not in verdict(Times(1.0, 0.9, 0.0, 1), workers=16, processes=1)
    sequences = verdict(Times(10.0, 9.0, 0.0, 160), workers=16, processes=1, noun="samples")
    assert sequences == "data-bound: 90% waiting; 16 workers give 16 samples/s"
    slow_network = verdict(Times(step=100.0, data=5.0, communication=40.0, images=1000), workers=8, processes=4)
    assert slow_network.startswith("communication-bound: 40% waiting for the other 3 processes, 10 images/s")
    fine = verdict(Times(step=100.0, data=5.0, communication=3.0, images=1000), workers=8, processes=4)
    assert fine.startswith("compute-bound: 92% computing")


def test_a_verdict_reads_as_a_sentence_for_one_and_for_many(monkeypatch):
    monkeypatch.setattr(engine.bottleneck, "share_of_cores", lambda: 1)
    waiting, exchanging = Times(1.0, 0.9, 0.0, 7), Times(1.0, 0.0, 0.9, 7)
    assert verdict(waiting, workers=1, processes=1) == "data-bound: 90% waiting; 1 worker gives 7 images/s"
    alone = "data-bound: 90% waiting; loading in the main process gives 7 images/s: more DATA.NUM_WORKERS (this process"
    assert verdict(waiting, workers=0, processes=1) == f"{alone} has 1 core)"
    both = verdict(waiting, workers=0, processes=1, decoding=lambda: ["A", "B"])
    assert both == f"{alone} has 1 core), A, or B"
    assert verdict(waiting, workers=2, processes=1, decoding=lambda: ["A", "B"]).endswith(" images/s: A, or B")
    assert "waiting for the other process, 7 images/s" in verdict(exchanging, workers=1, processes=2)
    assert "waiting for the other 2 processes, 7" in verdict(exchanging, workers=1, processes=3)


def kinds(shares: list[tuple[float, float]]) -> list[str]:
    """The verdicts of epochs with these shares of waiting for data and for other processes, one after the other."""
    said = [""]
    for loading, communication in shares:
        said.append(verdict(Times(1.0, loading, communication, 1), workers=4, processes=2, before=said[-1]))
    return [each.partition("-bound")[0] for each in said[1:]]


def test_a_share_around_the_threshold_does_not_make_the_verdict_flip():
    around = [(share, 0.0) for share in (0.14, 0.16, 0.14, 0.155, 0.13, 0.11, 0.149, 0.09, 0.14, 0.12)]
    assert kinds(around) == ["compute", *["data"] * 6, *["compute"] * 3]
    between = [(0.30, 0.31), (0.31, 0.30), (0.32, 0.28), (0.35, 0.29), (0.30, 0.32), (0.2, 0.4)]
    assert kinds(between) == [*["communication"] * 3, *["data"] * 2, "communication"]


def advice(folder, options: str = "") -> list[str]:
    """What is advised for 64 pixels and the images of a folder."""
    words = f"DATA.DATASET imagenet DATA.DATA_PATH {folder} DATA.IMG_SIZE 64 DATA.BATCH_SIZE 1 {options}".split()
    cfg = load_config(config_file("quickstart"), [*words, "TRAIN.GLOBAL_BATCH", "1"])
    plan = make_plan(cfg)
    return decoding_advice(cfg, data.loaders.build_loaders(cfg, plan).train, plan.image_size)


def test_advice_on_decoding_fits_what_the_images_are(tmp_path):
    for folder, size, kind in (("large", (200, 160), "jpg"), ("small", (80, 70), "jpg"), ("drawn", (200, 160), "png")):
        for split in ("train", "val"):
            for label in ("a", "b"):
                file = tmp_path / folder / split / label / f"1.{kind}"
                file.parent.mkdir(parents=True)
                Image.new("RGB", size).save(file)
    fast, prepared = "DATA.DECODER simplejpeg with AUG.BACKEND opencv", "a data set prepared with a short side of 74"
    first, second = advice(tmp_path / "large")
    assert first == fast and second.startswith(f"{prepared} pixels, where its images have about 160 (tools/prepare_im")
    assert advice(tmp_path / "small") == [fast]
    (only,) = advice(tmp_path / "drawn")
    assert only.startswith(prepared)
    assert advice(tmp_path / "small", "DATA.DECODER simplejpeg") == []
    digits = load_config(config_file("quickstart"))
    batches = data.loaders.build_loaders(digits, make_plan(digits)).train
    assert decoding_advice(digits, batches, (32, 32)) == []  # nothing is decoded


@pytest.mark.parametrize(
    ("given", "cores", "workers", "said"),
    [
        ("", 3, 3, "starts 3 loader processes for training and as many for validation: 3 fit its share of the cores,"),
        ("", 64, 8, "starts 8 loader processes for training and as many for validation\n"),
        ("DATA.NUM_WORKERS=5", 1, 5, "starts 5 loader processes .*, as asked: 1 fits its share of the cores"),
        ("DATA.NUM_WORKERS=8", 3, 8, "starts 8 loader processes .*, as asked: 3 fit its share of the cores"),
        ("DATA.NUM_WORKERS=0", 1, 0, None),
    ],
)
def test_only_the_default_number_of_loader_processes_is_lowered_to_the_cores(
    given, cores, workers, said, monkeypatch, tiny, log
):
    for module in (config, data.loaders):
        monkeypatch.setattr(module, "share_of_cores", lambda: cores)
    tiny.write_text(tiny.read_text().replace("NUM_WORKERS: 0, ", ""))
    cfg = load_config(str(tiny), given.split())
    plan = make_plan(cfg)
    with log.at_level("INFO", logger="polaformer"):
        loader = data.loaders.build_loaders(cfg, plan).train.loader
    assert plan.workers == loader.num_workers == workers
    assert re.search(said, log.text) if said else "loader processes" not in log.text
    stored, _ = config_from_tree(yaml.safe_load(cfg.dump()), "a checkpoint")
    assert make_plan(stored).workers == min(workers, cores)  # what a file says was given elsewhere


def test_a_containers_share_of_the_machine_counts_as_its_cores(monkeypatch, tmp_path):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(16)))
    monkeypatch.setattr(environment, "QUOTA", tmp_path / "cpu.max")
    for text, expected in (("250000 100000\n", 2), ("50000 100000\n", 1), ("max 100000\n", 16), ("6400000 100000", 16)):
        (tmp_path / "cpu.max").write_text(text)
        assert environment.cores() == expected
    (tmp_path / "cpu.max").unlink()
    assert environment.cores() == 16


def test_the_cores_are_shared_by_the_processes_of_a_node(monkeypatch):
    monkeypatch.setattr("utils.environment.cores", lambda: 7)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert share_of_cores() == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "9")
    assert share_of_cores() == 1


def test_a_slow_loader_is_called_data_bound(tiny, monkeypatch, log):
    collate = data.loaders._collate

    def slow(samples):
        time.sleep(0.6)  # ten times what a step takes on a machine with nothing else to do
        return collate(samples)

    monkeypatch.setattr(data.loaders, "_collate", slow)
    run(tiny, "TRAIN.EPOCHS 1 DATA.BATCH_SIZE 128")
    share = int(re.search(r"epoch 0 data-bound: (\d+)% waiting; loading in the main process gives", log.text)[1])
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
