"""How many images or sequences a second the forward pass takes, on synthetic input."""

import statistics
import time
from dataclasses import dataclass

import torch
from torch import nn
from yacs.config import CfgNode

from config import image_size
from utils.precision import autocast


@dataclass(frozen=True)
class Throughput:
    """Images per second of the forward pass: median, smallest and largest over `batches` timed batches."""

    median: float
    low: float
    high: float
    batches: int


@torch.inference_mode()
def throughput(
    config: CfgNode,
    model: nn.Module,
    device: torch.device,
    amp_dtype: torch.dtype | None,
    *,
    warmup: int = 5,
    batches: int = 30,
    seconds: float = 60.0,
) -> Throughput:
    """Time the forward pass on synthetic images of IMG_SIZE, or ids of full length, batch by batch.

    Stops after `batches` batches, or after `seconds` once at least 3 are timed.
    """
    model.eval()
    if config.MODEL.TYPE == "lra":
        documents = () if config.MODEL.LRA.DOCUMENTS == 1 else (config.MODEL.LRA.DOCUMENTS,)
        shape = (config.DATA.BATCH_SIZE, *documents, config.MODEL.LRA.LENGTH)
        images = torch.randint(1, config.MODEL.LRA.VOCABULARY, shape, device=device)
    else:
        shape = (config.DATA.BATCH_SIZE, config.MODEL.SWIN.IN_CHANS, *image_size(config))
        images = torch.randn(shape, device=device)

    def timed() -> float:
        start = time.perf_counter()
        with autocast(device, amp_dtype):
            model(images)
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
        rates.append(shape[0] / timed())
    return Throughput(statistics.median(rates), min(rates), max(rates), len(rates))
