"""Training steps of the byte-level text model over its length: python -m benchmarks.lra_speed

The model of configs/lra/text.yaml, full training steps (forward, loss, backward, AdamW) on random bytes, with polarity
attention and the attentions it is compared with in their plain form: softmax by PyTorch's fused kernel and by its
N×N matrix (math), and linear attention of relu. Time: all of a length in turn in one process, ratios within each round;
its growth with length in rounds of two lengths. On a GPU the fused kernel with a key mask is the memory-efficient one,
and flash attention is measured without a mask, in bfloat16. Memory: a process of its own for each. Without dropout,
which would keep softmax from its fused kernel. A gate comes first: padding that follows changes no logit.
"""

from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad

from benchmarks import common
from benchmarks.common import DTYPES, MEBIBYTE, Bar, Outcome, Spread, WrongResultError, interleaved_seconds, ratios
from models import build_model
from models.classifier import TrainableModel

PLAIN = "MODEL.LA.GATE False MODEL.LRA.LEARN_SCALE False"
UNMASKED, FLASH = "polarity, no mask", "softmax, no mask (flash)"
KINDS = {
    "polarity": "MODEL.LA.ATTENTION polarity",
    UNMASKED: "MODEL.LA.ATTENTION polarity",
    "relu": f"MODEL.LA.ATTENTION relu {PLAIN}",
    "softmax": f"MODEL.LA.ATTENTION softmax {PLAIN}",
    FLASH: f"MODEL.LA.ATTENTION softmax {PLAIN}",
    "softmax (math)": f"MODEL.LA.ATTENTION softmax {PLAIN}",
}
SPEED_BAR, SPEED_AT = 4.0, 4096  # times as fast as fused softmax there
GROWTH_BAR, GROWTH_TO = 4.8, 16384  # times the time of SPEED_AT, at most
MASK_BAR = 1.10  # times the time without a key mask, at most
MATH_LIMIT = 8192  # longer ones need tens of gigabytes for their matrices


def build(kind: str, length: int, alpha: float, device: torch.device) -> TrainableModel:
    options = f"{KINDS[kind]} MODEL.LRA.LENGTH {length} MODEL.DROP_RATE 0.0 MODEL.LRA.ATTENTION_DROP 0.0"
    config = common.configuration("lra/text", options, MODEL__LA__ALPHA=alpha)
    torch.manual_seed(0)
    model = build_model(config, 2).to(device)
    if "no mask" in kind:
        for block in model.blocks:  # type: ignore[union-attr]
            attention = block.attn
            attention.mix = partial(_without_mask, attention.mix)
    return model


def _without_mask(mix: Callable[..., Tensor], *tokens: Tensor, key_mask: Tensor, **named: Any) -> Tensor:
    return mix(*tokens, **named)


def gate(length: int, device: torch.device) -> None:
    """Raise WrongResultError unless the model's vectors are those of the documents without their padding."""
    for kind in ("polarity", "relu", "softmax"):
        model: Any = build(kind, length, 3.0, device).eval()
        ids = torch.randint(1, 257, (2, length // 2), device=device)
        with torch.no_grad():
            short, padded = model.forward_features(ids), 2 * model.forward_features(pad(ids, (0, length // 2)))
        if not torch.allclose(short, padded, rtol=1e-3, atol=1e-4):
            raise WrongResultError(f"{kind}: padding changes the result by {(short - padded).abs().max():.2g}")


class Steps(common.TrainingStep):
    """Of one kind at one length, on ids that end in a little padding."""

    def __init__(
        self, kind: str, length: int, batch_size: int, alpha: float, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.kind, model = kind, build(kind, length, alpha, device).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
        ids = torch.randint(1, 257, (batch_size, length), device=device)
        ids[:, length - length // 32 :] = 0
        super().__init__(model, optimizer, ids, torch.zeros(batch_size, dtype=torch.long, device=device), dtype)

    def attention(self) -> AbstractContextManager[None]:
        return sdpa_kernel(backends(self.kind))


def backends(kind: str) -> list[SDPBackend]:
    """The kernels that softmax may use."""
    if kind.endswith("(math)"):
        return [SDPBackend.MATH]
    if kind == FLASH:
        return [SDPBackend.FLASH_ATTENTION]
    return [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]


def step_memory(
    kind: str, length: int, batch_size: int, alpha: float, dtype: torch.dtype, device: torch.device
) -> float:
    """MiB that training steps add to their process: allocated on a GPU, resident on a CPU; in a process of its own."""
    if device.type == "cpu":
        Steps(kind, 64, batch_size, alpha, dtype, device)()  # what every step loads
        Path("/proc/self/clear_refs").write_text("5")  # the largest resident size starts anew
        before = _status("VmRSS")
        Steps(kind, length, batch_size, alpha, dtype, device)()
        return (_status("VmHWM") - before) / 1024
    steps = Steps(kind, length, batch_size, alpha, dtype, device)
    steps()
    torch.cuda.reset_peak_memory_stats()
    steps()
    return torch.cuda.max_memory_allocated() / MEBIBYTE


def _status(field: str) -> int:
    """KiB of this process, as Linux counts them."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1])


def kinds_at(length: int, dtype: torch.dtype, device: torch.device) -> list[str]:
    """Which are measured. A GPU's flash kernel takes neither a key mask nor float32; a CPU's takes both."""
    left_out = [kind for kind in KINDS if kind.endswith("(math)") and length > MATH_LIMIT]
    if device.type == "cpu" or dtype == torch.float32:
        left_out.append(FLASH)
    return [kind for kind in KINDS if kind not in left_out]


def measure_length(length: int, options: Namespace, device: torch.device) -> dict[str, Any]:
    """Seconds of a step of every kind, their ratio to polarity's in each round, and the memory of each."""
    setting = (length, options.batch_size, options.alpha, DTYPES[options.dtype], device)
    kinds = kinds_at(length, DTYPES[options.dtype], device)
    contenders = {kind: Steps(kind, *setting) for kind in kinds}
    samples = interleaved_seconds(device, contenders, options.repeats, options.warmup)
    del contenders
    return {
        "length": length,
        "seconds": {kind: Spread.of(values) for kind, values in samples.items()},
        "times_polarity": {kind: ratios(values, samples["polarity"]) for kind, values in samples.items()},
        "memory_mib": {
            kind: common.in_fresh_process(step_memory, kind, *setting, threads=options.threads)
            for kind in kinds
            if kind != UNMASKED
        },
        "samples": samples,
    }


def growth(options: Namespace, device: torch.device) -> Spread:
    """Time of a step with polarity attention at GROWTH_TO over that at SPEED_AT, in rounds of both."""
    setting = (options.batch_size, options.alpha, DTYPES[options.dtype], device)
    contenders = {length: Steps("polarity", length, *setting) for length in (SPEED_AT, GROWTH_TO)}
    samples = interleaved_seconds(device, contenders, 3 * options.repeats, options.warmup)
    return ratios(samples[GROWTH_TO], samples[SPEED_AT])


def bars_of(records: Sequence[dict[str, Any]], grown: Spread | None, device: torch.device) -> list[Bar]:
    by_length = {record["length"]: record for record in records}
    bars = []
    for record in records:
        masked = ratios(record["samples"]["polarity"], record["samples"][UNMASKED]).median
        bars.append(Bar(f"with a key mask over without, N = {record['length']}", masked, MASK_BAR, "at most"))
    if device.type == "cpu" and SPEED_AT in by_length:
        faster = by_length[SPEED_AT]["times_polarity"]["softmax"].median
        bars.append(Bar(f"speed over fused softmax, N = {SPEED_AT}", faster, SPEED_BAR))
    if device.type == "cpu" and grown:
        bars.append(Bar(f"time at N = {GROWTH_TO} over N = {SPEED_AT}", grown.median, GROWTH_BAR, "at most"))
    return bars


def draw(records: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Time and memory over length."""

    def panel(what: str) -> dict[str, dict[int, Spread | float]]:
        drawn = {kind: [record for record in records if kind in record["memory_mib"]] for kind in KINDS}
        return {kind: {each["length"]: each[what][kind] for each in mine} for kind, mine in drawn.items() if mine}

    panels = {"seconds a training step": panel("seconds"), "MiB a training step adds": panel("memory_mib")}
    common.draw_over_length(path, title, panels)


def measure(options: Namespace) -> Outcome:
    """Gate, then all lengths, a table of them."""
    device = torch.device(options.device)
    gate(256, device)
    records = []
    for length in options.lengths:
        records.append(measure_length(length, options, device))
        print(f"N = {length}: {records[-1]['times_polarity']['softmax'].text(digits=2)} × polarity", flush=True)
    rows = [
        (
            f"{record['length']:,}",
            kind,
            record["seconds"][kind].text(1e3, 0),
            record["times_polarity"][kind].text(digits=2),
            f"{record['memory_mib'][kind]:,.0f}" if kind in record["memory_mib"] else "",
        )
        for record in records
        for kind in record["seconds"]
    ]
    title = f"byte-level text model, batch {options.batch_size}, {options.dtype}, α = {options.alpha:g}"
    common.print_table(f"{title}: {common.SPREAD}", ("N", "attention", "ms a step", "× polarity", "MiB"), rows)
    grown = growth(options, device) if {SPEED_AT, GROWTH_TO} <= set(options.lengths) else None
    if grown:
        print(f"\nN = {GROWTH_TO:,} over N = {SPEED_AT:,}, in rounds of both: {grown.text(digits=2)}")
    lengths = [{name: value for name, value in record.items() if name != "samples"} for record in records]
    bars = bars_of(records, grown, device)
    return Outcome({"growth": grown, "lengths": lengths}, bars, partial(draw, records, title))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.argument_parser("lra_speed", __doc__, device=True)
    add = parser.add_argument
    add("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384], metavar="N")
    add("--batch-size", type=int, help="default: 2 on a CPU, 32 on a GPU")
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    add("--alpha", type=float, default=3.0)
    add("--repeats", type=int, help="timed rounds; default: 5 on a CPU, 50 on a GPU")
    add("--warmup", type=int, help="rounds before them; default: 1 on a CPU, 10 on a GPU")
    options = parser.parse_args(arguments)
    on_cpu = options.device == "cpu"
    options.batch_size = options.batch_size or (2 if on_cpu else 32)
    options.repeats = options.repeats or (5 if on_cpu else 50)
    options.warmup = (1 if on_cpu else 10) if options.warmup is None else options.warmup
    common.run(options, measure, recorded="batch_size dtype alpha repeats")


if __name__ == "__main__":
    main()
