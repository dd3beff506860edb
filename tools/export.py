"""Export a checkpoint: ONNX, torch.export, safetensors, a Hugging Face Hub folder, or weights to publish.

example: python tools/export.py --checkpoint FILE.pth --format onnx torch-export --output export
         python tools/export.py --checkpoint FILE.pth --format hub --release --ema

Every output is loaded again and its logits are compared with the checkpoint's own in PyTorch, on random images in
several batch sizes. One that deviates by more than the tolerance is removed.

Exit codes: 0 every output is right; 1 one deviates and was removed; 2 a mistake.
"""

import sys
from pathlib import Path

if not __package__:  # run as tools/export.py: what it imports lies beside tools/
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import json
import re
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from typing import NamedTuple

import safetensors.torch
import timm
import torch
import yaml
from torch import Tensor
from torch.export import Dim, ExportedProgram
from yacs.config import CfgNode

from config import image_size
from models import build_model
from models.classifier import TrainableModel
from models.files import CHECKPOINT_VERSION
from tools.checkpoints import add_checkpoint_arguments, given_config, load_model
from tools.command_line import answer, file_path, number, program
from tools.hub_folder import architecture_of, hub_config, model_card
from utils.checkpoints.writing import write_sidecar
from utils.files import file_digest
from utils.precision import exact_float32

ROOT = Path(__file__).resolve().parents[1]
# The exporter has implementations from 18 on, and PyTorch exports none beyond 23.
OPSETS = range(18, 24)
DEFAULT_OPSET = 18  # the oldest: every runtime that reads a newer one reads it too
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
TRACED_BATCH = 2
CHECKED_BATCHES = (1, 2, 5)
DIGITS_OF_HASH = 8  # as torch.hub's check_hash expects them at the end of a file name
# What a stored configuration says about the machine it ran on.
LOCAL_KEYS = {"DATA.DATA_PATH": "", "OUTPUT": "", "MODEL.RESUME": "", "MODEL.PRETRAINED": "", "TEST.REAL_LABELS": ""}

Logits = Callable[[Tensor], Tensor]  # images (B, C, H, W), normalised, to logits (B, classes)


class ExportError(ValueError):
    """An export that cannot be made as asked: the message says why and what to do."""


@dataclass
class Exportable:
    """The checkpoint to export, rebuilt."""

    path: Path
    model: TrainableModel
    config: CfgNode
    classes: list[str] | None
    ema: bool
    name: str  # of the outputs

    @cached_property
    def metadata(self) -> dict[str, str]:
        """What travels with the weights in formats that hold text."""
        citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
        return {
            "format": "pt",  # what safetensors files of PyTorch weights carry
            "model_type": self.config.MODEL.TYPE,
            "config": self.config.dump(),
            "classes": json.dumps(self.classes),
            "version": str(citation["version"]),
            "weights": "model_ema" if self.ema else "model",
            "source": self.path.name,
            "source_sha256": file_digest(self.path),
        }

    @cached_property
    def program(self) -> ExportedProgram:
        """The forward pass in PyTorch's own operators, for any batch size."""
        config = self.config.clone()
        config.defrost()
        config.MODEL.LA.BACKEND = "reference"  # the backend whose graph needs no operator of ours
        model = build_model(config, self.model.num_classes).eval()
        model.load_state_dict(self.model.state_dict())
        with torch.no_grad():
            return torch.export.export(model, (self.images(TRACED_BATCH),), dynamic_shapes=({0: Dim("batch")},))

    def images(self, batch: int) -> Tensor:
        """Random normalised images of the model's size."""
        channels = self.config.MODEL.SWIN.IN_CHANS
        return torch.randn(batch, channels, *image_size(self.config), generator=torch.Generator().manual_seed(batch))


def open_exportable(
    path: Path, *, ema: bool = False, config: CfgNode | None = None, name: str | None = None
) -> Exportable:
    """The checkpoint `path`; its configuration without the paths of the machine it was trained on.

    Raises CheckpointError (models.load says when), ExportError for a `name` that is no file name.
    """
    loaded = load_model(path, ema=ema, config=config)
    own = loaded.config.clone()
    own.defrost()
    for key, value in LOCAL_KEYS.items():
        own.merge_from_list([key, value])
    own.MODEL.NUM_CLASSES = loaded.model.num_classes
    own.freeze()
    if name is None:
        architecture, arguments = architecture_of(own)
        name = architecture if not arguments else re.sub(r"\W+", "_", own.MODEL.NAME)
    elif not re.fullmatch(r"\w+", name):  # torch.hub takes what follows a hyphen for the digits of the hash
        raise ExportError(f"--name {name!r}: expected letters, digits and underscores, as in pola_swin_tiny_run3")
    return Exportable(path, loaded.model, own, loaded.classes, ema, name)


# -- Formats: each writes a file or folder, and reads it back as a function from images to logits


def write_onnx(source: Exportable, path: Path, opset: int) -> None:
    """One file, input `images` (batch, channels, height, width) and output `logits` (batch, classes)."""
    import onnx

    about = {**source.metadata, "mean": json.dumps(source.config.DATA.MEAN), "std": json.dumps(source.config.DATA.STD)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter about itself
        program = torch.onnx.export(
            source.program,
            dynamo=True,
            opset_version=opset,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: "batch"},),
            verbose=False,
        )
    assert program is not None
    program.model.metadata_props.update(about)
    program.save(path, external_data=False)
    exported = onnx.load(path)
    onnx.checker.check_model(exported)
    written = {entry.domain: entry.version for entry in exported.opset_import}[""]
    if written != opset:
        raise ExportError(f"PyTorch exported opset {written} instead of {opset}; ask for --opset {written}")


def read_onnx(path: Path) -> Logits:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def write_torch_export(source: Exportable, path: Path) -> None:
    """A .pt2 file for torch.export.load; `metadata.json` is its extra file."""
    torch.export.save(source.program, path, extra_files={"metadata.json": json.dumps(source.metadata)})


def read_torch_export(path: Path) -> Logits:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the reader about its own buffers
        return torch.export.load(path).module()


def write_safetensors(source: Exportable, path: Path) -> None:
    """Weights, with the metadata that models.load rebuilds the model from."""
    weights = {name: value.contiguous() for name, value in source.model.state_dict().items()}
    path.write_bytes(safetensors.torch.save(weights, source.metadata))  # save_file would leave it to its owner alone


def write_release(source: Exportable, path: Path) -> None:
    """Weights, class names and configuration; the same bytes from the same weights."""
    content = {
        "model": source.model.state_dict(),
        "classes": source.classes,
        "config": source.config.dump(),
        "version": CHECKPOINT_VERSION,
    }
    with path.open("wb") as file:  # given a name, torch.save would write it into the file
        torch.save(content, file)


def read_checkpoint(path: Path) -> Logits:
    return load_model(path).model


def write_hub(source: Exportable, path: Path) -> None:
    """A folder of the Hugging Face Hub that timm loads."""
    path.mkdir()
    write_safetensors(source, path / "model.safetensors")
    config = hub_config(source.config, source.model.num_features, source.classes)
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    parameters = sum(parameter.numel() for parameter in source.model.parameters())
    card = model_card(source.name, source.config, config, parameters, source.metadata)
    (path / "README.md").write_text(card, encoding="utf-8")


def read_hub(path: Path) -> Logits:
    return timm.create_model(f"local-dir:{path}", pretrained=True).eval()


class Format(NamedTuple):
    suffix: str
    write: Callable[[Exportable, Path], None]
    read: Callable[[Path], Logits]
    exact: bool  # the same weights in the same code give the same logits


def formats(opset: int = DEFAULT_OPSET) -> dict[str, Format]:
    """Every format by its name on the command line."""
    return {
        "onnx": Format(".onnx", lambda source, path: write_onnx(source, path, opset), read_onnx, exact=False),
        "torch-export": Format(".pt2", write_torch_export, read_torch_export, exact=False),
        "safetensors": Format(".safetensors", write_safetensors, read_checkpoint, exact=True),
        "hub": Format("", write_hub, read_hub, exact=True),
        "release": Format(".pth", write_release, read_checkpoint, exact=True),
    }


# -- Writing, checking, publishing under the final name


class Deviation(NamedTuple):
    """Largest absolute difference of any logit, and the same over the largest logit."""

    absolute: float
    relative: float


@torch.inference_mode()
def deviation_from_eager(source: Exportable, logits: Logits) -> Deviation:
    """Over random images in CHECKED_BATCHES; NaN where any logit is."""
    differences, largest = [], []
    with exact_float32():
        for batch in CHECKED_BATCHES:
            images = source.images(batch)
            expected = source.model(images)
            differences.append((logits(images) - expected).abs().max())
            largest.append(expected.abs().max())
    absolute = torch.stack(differences).max()
    return Deviation(absolute.item(), (absolute / torch.stack(largest).max()).item())


class Exported(NamedTuple):
    path: Path  # where it is, or would be if it were right
    deviation: Deviation
    allowed: float  # relative

    @property
    def right(self) -> bool:
        return self.deviation.relative <= self.allowed


def export(source: Exportable, name: str, made: Format, folder: Path, tolerance: float) -> Exported:
    """Write one format into `folder`, read it back and compare. Only what is right gets its final name."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{source.name}.{name}.tmp{made.suffix}"
    _remove(temporary)
    try:
        made.write(source, temporary)
        path = folder / (source.name + made.suffix)
        if name == "release":
            path = path.with_stem(f"{source.name}-{file_digest(temporary)[:DIGITS_OF_HASH]}")
        allowed = 0.0 if made.exact else tolerance
        result = Exported(path, deviation_from_eager(source, made.read(temporary)), allowed)
        if result.right:
            _publish(temporary, path)
            for weights in [path] if path.is_file() else path.glob("*.safetensors"):
                if weights.suffix in (".pth", ".safetensors"):
                    write_sidecar(weights)
        return result
    finally:
        _remove(temporary)


def _publish(temporary: Path, path: Path) -> None:
    """Give `temporary` its final name; of a folder that exists, replace the files."""
    if path.is_dir():
        for file in temporary.iterdir():
            file.replace(path / file.name)
    else:
        temporary.replace(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# -- Command line


def _opset(text: str) -> int:
    if not text.isdecimal() or int(text) not in OPSETS:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not supported: expected {OPSETS[0]} to {OPSETS[-1]} (older ones lack operators that the"
            f" exporter needs; {DEFAULT_OPSET} is the default)"
        )
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = program("tools/export.py", __doc__)
    add = parser.add_argument
    add_checkpoint_arguments(parser, opts=True)
    names = [name for name in formats() if name != "release"]
    add("--format", nargs="+", choices=names, default=[], help="what to write; several are allowed")
    what = "also write NAME-<SHA-256>.pth with weights, classes and configuration alone, to be published"
    add("--release", action="store_true", help=what)
    add("--output", metavar="FOLDER", type=file_path, default=Path("export"), help="default: export")
    add("--name", help="of the outputs; default: timm's name of the model, else MODEL.NAME")
    what = f"of ONNX, {OPSETS[0]} to {OPSETS[-1]}; default {DEFAULT_OPSET}"
    add("--opset", type=_opset, default=DEFAULT_OPSET, metavar="N", help=what)
    what = "largest deviation of an ONNX or torch.export logit, over the largest logit; default 1e-4. The other"
    what += " formats have to be equal"
    add("--tolerance", type=number(0, 1, open_high=True), default=1e-4, metavar="X", help=what)
    return parser


def require_packages(names: Sequence[str]) -> None:
    """Raise ExportError where a format in `names` needs a package that is not installed."""
    lacking = [package for package in ONNX_PACKAGES if find_spec(package) is None] if "onnx" in names else []
    if lacking:
        raise ExportError(
            f"--format onnx needs {', '.join(lacking)}, which {'is' if len(lacking) == 1 else 'are'} not installed:"
            f" pip install {' '.join(lacking)}"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    names = [*dict.fromkeys(arguments.format), *(["release"] if arguments.release else [])]
    if not names:
        parser.error(f"nothing to write: --format takes {', '.join(formats())[: -len(', release')]}, or add --release")
    return answer(lambda: run(arguments, names))


def run(arguments: argparse.Namespace, names: Sequence[str]) -> int:
    """Write and check every format in `names`; 1 where one deviates."""
    require_packages(names)
    config = given_config(arguments)
    source = open_exportable(arguments.checkpoint, ema=arguments.ema, config=config, name=arguments.name)
    available = formats(arguments.opset)
    wrong = 0
    for name in names:
        result = export(source, name, available[name], arguments.output, arguments.tolerance)
        wrong += not result.right
        print(_line(f"onnx (opset {arguments.opset})" if name == "onnx" else name, result))
    return 1 if wrong else 0


def _line(name: str, result: Exported) -> str:
    batches = f"batches of {', '.join(map(str, CHECKED_BATCHES))}"
    found = result.deviation
    if result.allowed == 0.0 and result.right:
        return f"{name}: {result.path}, logits equal to PyTorch's ({batches})"
    deviation = (
        f"logits deviate from PyTorch's by at most {found.absolute:.1e}, {found.relative:.1e} of the largest logit"
        f" ({batches}; allowed {result.allowed:g})"
    )
    if result.right:
        return f"{name}: {result.path}, {deviation}"
    return f"{name}: WRONG, {result.path} was not written: {deviation}"


if __name__ == "__main__":
    sys.exit(main())
