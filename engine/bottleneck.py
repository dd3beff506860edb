"""What bounds a run: the shares of a step that wait for data and for other processes, and what to change about it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil

from yacs.config import CfgNode

from data.loaders import Batches
from utils.environment import share_of_cores

NOTICED = 0.15  # share of the time from which waiting is called a bound
INERTIA = 0.05  # by which a share that was called the bound before may be lower, so that the verdict does not flicker
CROPPED = 0.875  # side of a training crop that a short side of a prepared data set allows for
ROOM = 1.25  # times as large as needed, from which on preparing images is worth it


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


def verdict(
    times: Times,
    *,
    workers: int,
    processes: int,
    noun: str = "images",
    before: str = "",
    decoding: Callable[[], Sequence[str]] = lambda: (),
) -> str:
    """One sentence: what bounds the run and what to change; `workers` loader processes for each of `processes`.

    Args:
        noun: what the samples are called.
        before: the verdict of the epoch before.
        decoding: what would make the samples load faster, in words; asked where they are waited for.
    """
    shares = {"data": times.data / times.step, "communication": times.communication / times.step}
    felt = {kind: share + INERTIA * before.startswith(kind) for kind, share in shares.items()}
    kind = max(felt, key=lambda each: felt[each])
    rate = f"{times.images / times.step:,.0f} {noun}/s"
    if felt[kind] < NOTICED:
        rest = 1 - sum(shares.values())
        return f"compute-bound: {rest:.0%} computing, {rate}: the input pipeline and network keep up"
    if kind == "data":
        loaders = f"{_count(workers, 'worker')} {'gives' if workers == 1 else 'give'}"
        loaders = loaders if workers else "loading in the main process gives"
        cores = share_of_cores()
        advice = [f"more DATA.NUM_WORKERS (this process has {_count(cores, 'core')})"] if workers < cores else []
        advice += decoding()
        if len(advice) > 1:
            advice[-1] = f"or {advice[-1]}"
        said = f"data-bound: {shares[kind]:.0%} waiting; {loaders} {rate}"
        return said + (f": {', '.join(advice)}" if advice else "")
    others = "the other process" if processes == 2 else f"the other {processes - 1} processes"
    return (
        f"communication-bound: {shares[kind]:.0%} waiting for {others}, {rate}: a larger DATA.BATCH_SIZE or"
        " TRAIN.ACCUMULATION_STEPS exchanges gradients less often; one slow process or link makes all others wait"
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def decoding_advice(config: CfgNode, batches: Batches, size: tuple[int, int]) -> list[str]:
    """What would make images of (height, width) load faster, by what is in the data set: a look at a few of them."""
    names, sides = batches.sample_sizes
    needed, advice = ceil(max(size) / CROPPED), []
    if config.DATA.DECODER == "pillow" and any(name.lower().endswith((".jpg", ".jpeg")) for name in names):
        advice.append("DATA.DECODER simplejpeg with AUG.BACKEND opencv")
    if sides and (side := sorted(sides)[len(sides) // 2]) > ROOM * needed:
        advice.append(
            f"a data set prepared with a short side of {needed} pixels, where its images have about {side}"
            f" (tools/prepare_imagenet.py --short-side {needed})"
        )
    return advice
