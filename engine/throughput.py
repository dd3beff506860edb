"""How many images or sequences a second the forward pass takes, on synthetic input."""

import statistics
import time
from dataclasses import dataclass

import torch
from yacs.config import CfgNode

from data.builders import builder_of
from engine.training import place
from logger import get_logger
from models import build_model
from models.classifier import TrainableModel
from utils.devices import synchronise
from utils.precision import autocast, autocast_dtype


@dataclass(frozen=True)
class Throughput:
    """Samples per second of the forward pass: median, smallest and largest over `batches` timed batches."""

    median: float
    low: float
    high: float
    batches: int


@torch.inference_mode()
def throughput(
    batch_size: int,
    model: TrainableModel,
    device: torch.device,
    amp_dtype: torch.dtype | None,
    *,
    warmup: int = 5,
    batches: int = 30,
    seconds: float = 60.0,
) -> Throughput:
    """Time the forward pass on random samples of the model's full size, batch by batch.

    Stops after `batches` batches, or after `seconds` once at least 3 are timed.
    """
    model.eval()
    samples = model.to(device).example_input(batch_size)

    def timed() -> float:
        start = time.perf_counter()
        with autocast(device, amp_dtype):
            model(samples)
        synchronise(device)
        return time.perf_counter() - start

    begin = time.perf_counter()
    for _ in range(warmup):
        timed()
        if time.perf_counter() - begin > seconds:
            break
    rates: list[float] = []
    begin = time.perf_counter()
    while len(rates) < batches and (len(rates) < 3 or time.perf_counter() - begin < seconds):
        rates.append(batch_size / timed())
    return Throughput(statistics.median(rates), min(rates), max(rates), len(rates))


def run_throughput(config: CfgNode, device: torch.device) -> None:
    """Measure the forward pass on synthetic input; no data set is needed."""
    model = place(build_model(config), device)
    if config.COMPILE:
        model.compile()
    amp_dtype = autocast_dtype(config.AMP_DTYPE, device) if config.AMP else None
    result = throughput(config.DATA.BATCH_SIZE, model, device, amp_dtype)
    get_logger().info(
        "throughput of %s, batch %d, %s, %s: median %.1f %s/s (lowest %.1f, highest %.1f, %d batches)",
        config.MODEL.NAME,
        config.DATA.BATCH_SIZE,
        str(amp_dtype or torch.float32).removeprefix("torch."),
        model.input_size,
        result.median,
        builder_of(config).modality.noun,
        result.low,
        result.high,
        result.batches,
    )
