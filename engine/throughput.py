"""How many images or sequences a second the forward pass takes, on synthetic input."""

import statistics
import time
from dataclasses import dataclass

import torch

from models.classifier import TrainableModel
from utils.precision import autocast


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
        if device.type == "cuda":
            torch.cuda.synchronize(device)
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
