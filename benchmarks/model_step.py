"""Time a training step of whole models, ours and literal ones: python -m benchmarks.model_step.

A step is forward pass, cross entropy, backward pass and optimizer step on synthetic images, each contender on its own
copy of the same weights. The baseline is our model with the literal op, PolaFormer++'s literal as a whole; timm models
of about the same size run beside them. A gate comes first: both sides give the same logits in
float32. Eager contenders are interleaved in one process; with --compile each compiled model runs in a fresh process,
interleaved with the eager baseline there.
README.md beside this file says what is counted and how results are named.
"""

import argparse
import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import timm
import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from benchmarks import common
from benchmarks.baseline import (
    literal_polarity_attention,
    patched_model_attention,
    patched_nalaformer,
    patched_pola_pp,
)
from benchmarks.common import DTYPES, MEBIBYTE, Bar, Outcome, Spread, WrongResultError, in_fresh_process, ratios
from models import build_model
from models.classifier import Classifier
from models.nalaformer import NaLaFormer
from models.ops.polarity_attention import choose_backend, polarity_attention
from models.pola_pp import PolaPP
from optimizer import build_optimizer
from utils.memory import saved_bytes
from utils.precision import exact_float32

TIMM_SWIN = "swin_tiny_patch4_window7_224"
OPS: dict[str, Callable[..., Tensor]] = {"baseline": literal_polarity_attention, "ours": polarity_attention}
# Of other bodies the polarity op is patched.
LITERAL_BODIES: dict[type[nn.Module], Callable[[], AbstractContextManager[object]]] = {
    PolaPP: patched_pola_pp,
    NaLaFormer: patched_nalaformer,
}
TIMM_PEERS: dict[str, tuple[str, ...]] = {
    "pola_swin_t": (TIMM_SWIN,),
    "pola_pvt_t": ("pvt_v2_b1",),
    **dict.fromkeys(("pola_pp_b0", "nalaformer_xt"), ("fastvit_t12", "pvt_v2_b0")),
    **dict.fromkeys(("pola_pp_b2", "nalaformer_t"), ("pvt_v2_b1", "fastvit_sa24")),
}
LOGITS_ERROR = 1e-5  # largest relative L2 difference of float32 logits that passes the gate

# Baseline's float32 eager step over ours, batch 8, 224², on a CPU; by model, then (precision, compiled).
CPU_STEP_BARS: dict[str, dict[tuple[str, bool], float]] = {
    "pola_pvt_t": {("float32", False): 1.5, ("float32", True): 1.4, ("bfloat16", False): 2.35},
    "pola_swin_t": {("float32", False): 1.38, ("float32", True): 1.4},
}
PEER_BAR = 1.05  # our step over that of the peer, float32 on a CPU, of models whose bars these are
SAVED_BYTES_BARS = {"pola_pvt_t": 0.64, "pola_swin_t": 0.65}
THROUGHPUT_BARS = {224: 1.0, 512: 1.3}  # images per second of Pola-Swin-T over timm's Swin-T, bfloat16, on a GPU


@dataclass(frozen=True)
class Setting:
    """What one measurement needs to know; travels to fresh processes."""

    model: str
    batch_size: int
    image_size: int
    repeats: int
    device: str
    threads: int | None


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    variant = "" if options.models == list(CPU_STEP_BARS) else f"-{'-'.join(options.models)}"
    common.run(options, measure, recorded="batch_size image_size repeats", variant=variant)


def measure(options: argparse.Namespace) -> Outcome:
    """Steps of all models, gate included, then images per second against timm's, a table of each."""

    def setting(model: str, batch_size: int, image_size: int) -> Setting:
        return Setting(model, batch_size, image_size, options.repeats, options.device, options.threads)

    steps: list[dict[str, Any]] = []
    for name in options.models:
        mine = setting(name, options.batch_size, options.image_size)
        steps.append(measure_eager(mine, options.precision))
        print_memory(steps[-1])
        print_steps(steps[-1])
        for each in itertools.product(options.compile, options.precision):
            steps.append(in_fresh_process(measure_compiled, mine, *each, threads=options.threads))
            print_steps(steps[-1])
    throughputs = []
    for size in options.timm_sizes:
        mine = setting("pola_swin_t", options.timm_batch_size, size)
        throughputs.append(in_fresh_process(measure_against_timm, mine, threads=options.threads))
        print_throughput(throughputs[-1])
    bars = [bar for record in steps for bar in step_bars(record)]
    bars += [bar for record in throughputs for bar in throughput_bars(record)]
    return Outcome({"precisions": options.precision, "steps": steps, "throughput": throughputs}, bars)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = common.argument_parser("model_step", __doc__, device=True, batch_size=8, image_size=224, repeats=9)
    add = parser.add_argument
    add("--models", nargs="+", default=list(CPU_STEP_BARS), help="names of files in configs/")
    add("--precision", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    what = "also whole models under torch.compile, ours (the default) or the baseline's too: minutes each"
    add("--compile", nargs="*", choices=tuple(OPS), help=what)
    what = "image sizes at which Pola-Swin-T trains against timm's Swin-T; default: 224 and 512 on a GPU, else none"
    add("--timm-sizes", nargs="*", type=int, help=what)
    add("--timm-batch-size", type=int, default=128, help="halved until it fits the GPU's memory")
    options = parser.parse_args(arguments)
    if options.compile is None:
        options.compile = []
    elif not options.compile:
        options.compile = ["ours"]
    if options.timm_sizes is None:
        options.timm_sizes = list(THROUGHPUT_BARS) if options.device == "cuda" else []
    return options


# -- What is compared


class Trainer(common.TrainingStep):
    """Of a copy of a model with its optimizer, which computes as one side does."""

    def __init__(
        self, model: nn.Module, config: CfgNode, images: Tensor, side: str, precision: str, compiled: bool = False
    ) -> None:
        self.bare_model, self.side = copy.deepcopy(model).to(images.device).train(), side
        optimizer = build_optimizer(config, cast(Classifier, self.bare_model))  # or timm's, alike in what it reads
        labels = torch.arange(len(images), device=images.device)
        model = cast(nn.Module, torch.compile(self.bare_model)) if compiled else self.bare_model
        super().__init__(model, optimizer, images, labels, DTYPES[precision])

    def attention(self) -> AbstractContextManager[object]:
        if patched := LITERAL_BODIES.get(type(self.bare_model)):
            return patched() if self.side == "baseline" else nullcontext()
        return patched_model_attention(OPS[self.side])

    def logits(self) -> Tensor:
        """In evaluation mode, where no stochastic depth is in the way."""
        self.bare_model.eval()
        with torch.no_grad(), exact_float32():
            logits = self.forward()
        self.bare_model.train()
        return logits

    def saved_bytes(self) -> int:
        """For the backward pass, parameters excluded."""
        return saved_bytes(self.forward, excluded=self.bare_model.parameters())


def configuration(setting: Setting) -> CfgNode:
    """That of the model, at the image size asked for.

    The window of Pola-Swin's polarity blocks grows with the image, so that it covers the first map, as in the official
    configurations for 224 and 384.
    """
    window = f"MODEL.SWIN.WINDOW_SIZE {setting.image_size // 4}" if setting.model.startswith("pola_swin") else ""
    return common.configuration(setting.model, f"DATA.IMG_SIZE {setting.image_size} {window}")


def synthetic_images(setting: Setting) -> Tensor:
    shape = (setting.batch_size, 3, setting.image_size, setting.image_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(setting.device)


# -- Measurements


def measure_eager(setting: Setting, precisions: Sequence[str]) -> dict[str, Any]:
    """Logits, bytes saved and steps of both sides. Raises WrongResultError where the logits of the two sides differ."""
    config, images = configuration(setting), synthetic_images(setting)
    torch.manual_seed(0)
    model = build_model(config)
    trainers = {
        (side, precision): Trainer(model, config, images, side, precision)
        for precision in dict.fromkeys(["float32", *precisions])
        for side in OPS
    }
    baseline, ours = trainers["baseline", "float32"], trainers["ours", "float32"]
    error = common.relative_error(ours.logits(), baseline.logits())
    if not error <= LOGITS_ERROR:
        raise WrongResultError(
            f"float32 logits of {setting.model} are off by {error:.2e} relative to the baseline's, allowed is"
            f" {LOGITS_ERROR:g}"
        )
    record = {"logits_error": error, "saved_bytes": {"baseline": baseline.saved_bytes(), "ours": ours.saved_bytes()}}
    if "float32" not in precisions:
        del trainers["ours", "float32"]
    for name in TIMM_PEERS.get(setting.model, ()):
        size: dict[str, Any] = {"img_size": setting.image_size} if name == TIMM_SWIN else {}
        peer = timm.create_model(name, drop_path_rate=config.MODEL.DROP_PATH_RATE, **size)
        trainers |= {(name, each): Trainer(peer, config, images, "ours", each) for each in precisions}
    contenders = {(*key, False): trainer for key, trainer in trainers.items()}
    backend = choose_backend("auto", images.device)  # of polarity attention, in "ours"
    return {**step_record(setting, contenders), **record, "backend": backend}


def measure_compiled(setting: Setting, side: str, precision: str) -> dict[str, Any]:
    """Steps of one compiled model and of the eager baselines; the only compiled model of its process."""
    config, images = configuration(setting), synthetic_images(setting)
    torch.manual_seed(0)
    model = build_model(config)
    contenders = {
        ("baseline", each, False): Trainer(model, config, images, "baseline", each)
        for each in dict.fromkeys(["float32", precision])
    }
    compiled = Trainer(model, config, images, side, precision, compiled=True)
    first_step = common.seconds(images.device, compiled)
    contenders[side, precision, True] = compiled
    return {**step_record(setting, contenders), "first_compiled_step_s": first_step}


def step_record(setting: Setting, contenders: Mapping[tuple[str, str, bool], Trainer]) -> dict[str, Any]:
    """Time all contenders, by (side, precision, compiled), interleaved."""
    device = torch.device(setting.device)
    samples = common.interleaved_seconds(device, contenders, setting.repeats, warmup=3 if device.type == "cuda" else 1)
    steps = [
        {
            "side": side,
            "precision": precision,
            "compiled": compiled,
            "parameters": sum(p.numel() for p in contenders[side, precision, compiled].bare_model.parameters()),
            "step_ms": Spread.of(seconds, 1e3),
            "speedup_over_float32_baseline": ratios(samples["baseline", "float32", False], seconds),
            "speedup_over_baseline_of_same_precision": ratios(samples["baseline", precision, False], seconds),
        }
        for (side, precision, compiled), seconds in samples.items()
    ]
    return {**asdict(setting), "contenders": steps}


def measure_against_timm(setting: Setting) -> dict[str, Any]:
    """Images per second of training, bfloat16 autocast, against timm's Swin-T at the same image and batch size.

    The batch is halved until both fit the memory.
    """
    while True:
        try:
            return _measure_against_timm(setting)
        except torch.OutOfMemoryError:
            if setting.batch_size == 1:
                raise
        setting = replace(setting, batch_size=setting.batch_size // 2)  # outside: the error holds on to the memory
        torch.cuda.empty_cache()


def _measure_against_timm(setting: Setting) -> dict[str, Any]:
    config, images = configuration(setting), synthetic_images(setting)
    swin = timm.create_model(
        TIMM_SWIN, pretrained=False, img_size=setting.image_size, drop_path_rate=config.MODEL.DROP_PATH_RATE
    )
    contenders = {
        setting.model: Trainer(build_model(config), config, images, "ours", "bfloat16"),
        TIMM_SWIN: Trainer(swin, config, images, "ours", "bfloat16"),
    }
    samples = common.interleaved_seconds(images.device, contenders, setting.repeats, warmup=3)
    rates = {name: Spread.of(setting.batch_size / each for each in seconds) for name, seconds in samples.items()}
    ratio = ratios(samples[TIMM_SWIN], samples[setting.model])
    return {**asdict(setting), "precision": "bfloat16", "images_per_s": rates, "ratio": ratio}


# -- Bars and output


def step_bars(record: Mapping[str, Any]) -> list[Bar]:
    """The bars that apply to a record of steps: batch 8 at 224², times on a CPU only."""
    model = record["model"]
    bars: list[Bar] = []
    if (record["batch_size"], record["image_size"]) != (8, 224):
        return bars
    if "saved_bytes" in record and model in SAVED_BYTES_BARS:
        saved = record["saved_bytes"]["ours"] / record["saved_bytes"]["baseline"]
        bars.append(Bar(f"{model}: bytes saved over baseline, float32", saved, SAVED_BYTES_BARS[model], "at most"))
    for step in record["contenders"]:
        precision, compiled = step["precision"], step["compiled"]
        bound = CPU_STEP_BARS.get(model, {}).get((precision, compiled))
        if record["device"] != "cpu" or step["side"] != "ours" or bound is None:
            continue
        if precision == "bfloat16" and "avx512_bf16" not in common.cpu_flags():
            continue
        what = f"{model}: step, {precision}, {'compiled' if compiled else 'eager'}, over eager float32 baseline"
        bars.append(Bar(what, step["speedup_over_float32_baseline"].median, bound))
    steps = {step["side"]: step["step_ms"].median for step in record["contenders"] if step["precision"] == "float32"}
    if record["device"] == "cpu" and model in CPU_STEP_BARS and "ours" in steps:
        peers = [name for name in TIMM_PEERS[model] if name in steps]
        bars += [
            Bar(f"{model}: step, float32, over {name}", steps["ours"] / steps[name], PEER_BAR, "at most")
            for name in peers
        ]
    return bars


def throughput_bars(record: Mapping[str, Any]) -> list[Bar]:
    """Images per second over timm's, on a GPU."""
    size = record["image_size"]
    if record["device"] != "cuda" or size not in THROUGHPUT_BARS:
        return []
    what = f"{record['model']}: images per second over {TIMM_SWIN}, {size}², batch {record['batch_size']}, bfloat16"
    return [Bar(what, record["ratio"].median, THROUGHPUT_BARS[size])]


def print_memory(record: Mapping[str, Any]) -> None:
    baseline, ours = (record["saved_bytes"][side] / MEBIBYTE for side in ("baseline", "ours"))
    print(
        f"\n{record['model']}, batch {record['batch_size']}, {record['image_size']}², float32: saved for the backward"
        f" pass {ours:.0f} MiB, baseline {baseline:.0f} MiB, ratio {ours / baseline:.3f}; logits differ by"
        f" {record['logits_error']:.1e}",
        flush=True,
    )


def print_steps(record: Mapping[str, Any]) -> None:
    rows = [
        (
            f"{step['side']} {step['precision']}{', compiled' if step['compiled'] else ''}",
            f"{step['parameters'] / 1e6:.1f}",
            step["step_ms"].text(digits=0),
            step["speedup_over_float32_baseline"].text(digits=2),
            step["speedup_over_baseline_of_same_precision"].text(digits=2),
        )
        for step in record["contenders"]
    ]
    title = f"{record['model']}, training step, batch {record['batch_size']}, {record['image_size']}²"
    if "first_compiled_step_s" in record:
        title += f"; first step with compilation {record['first_compiled_step_s']:.0f} s"
    header = ("", "M parameters", f"ms, {common.SPREAD}", "× float32 baseline", "× baseline, same precision")
    common.print_table(title, header, rows)


def print_throughput(record: Mapping[str, Any]) -> None:
    rows = [(name, rate.text()) for name, rate in record["images_per_s"].items()]
    rows.append(("ratio", record["ratio"].text(digits=2)))
    title = f"training, batch {record['batch_size']}, {record['image_size']}², bfloat16"
    common.print_table(title, ("", f"images per second, {common.SPREAD}"), rows)


if __name__ == "__main__":
    main()
