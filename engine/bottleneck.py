"""What bounds a run: the shares of a step that wait for data and for other processes, and what to change about it."""

import os
from dataclasses import dataclass

NOTICED = 0.15  # share of the time from which waiting is called a bound


@dataclass
class Times:
    """Seconds, summed over steps: whole steps, waiting for data, waiting for other processes beyond the backward pass.

    The means over all processes, each of which waits for its own data; `images` of all processes together.
    """

    step: float = 0.0
    data: float = 0.0
    communication: float = 0.0
    images: int = 0

    def add(self, other: "Times") -> None:
        self.step += other.step
        self.data += other.data
        self.communication += other.communication
        self.images += other.images


def verdict(times: Times, *, workers: int, processes: int, noun: str = "images") -> str:
    """One sentence: what bounds the run and what to change; `workers` loader processes for each of `processes`.

    `noun`: what the samples are called; the advice on decoding is for images.
    """
    data, communication = times.data / times.step, times.communication / times.step
    rate = f"{times.images / times.step:,.0f} {noun}/s"
    if data >= NOTICED and data >= communication:
        loaders = f"{workers} workers" if workers else "loading in the main process"
        cores = (os.cpu_count() or 1) // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        advice = [f"more DATA.NUM_WORKERS (this process has {cores} cores)"] if workers < cores else []
        if noun == "images":
            advice += [
                "DATA.DECODER simplejpeg with AUG.BACKEND opencv",
                "or a data set prepared with a short side of 256 pixels (tools/prepare_imagenet.py)",
            ]
        return f"data-bound: {data:.0%} waiting; {loaders} give {rate}" + (f": {', '.join(advice)}" if advice else "")
    if communication >= NOTICED:
        return (
            f"communication-bound: {communication:.0%} waiting for the other {processes - 1} processes, {rate}:"
            " a larger DATA.BATCH_SIZE or TRAIN.ACCUMULATION_STEPS exchanges gradients less often; one slow process or"
            " link makes all others wait"
        )
    return f"compute-bound: {1 - data - communication:.0%} computing, {rate}: the input pipeline and network keep up"
