"""Polarity attention on a CPU with native.cpp: what is no matrix product takes one pass over a block.

`python -m models.ops.polarity_attention` builds it for this machine, with the C++ compiler (CXX, else g++).

Nothing is built by importing or by training: what was built before is taken, from a file whose name has the source, the
processor's vectors and PyTorch's version in it. Under torch.compile the functions of eager.py are traced instead, which
the compiler fuses itself.
"""

import hashlib
import logging
import math
import os
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..linear_attention import Blocks, Scratch, Stream, fill, linear_attention_eager
from .eager import PolarityFeatures

logger = logging.getLogger("polaformer")

SOURCE = Path(__file__).with_name("native.cpp")
FOLDER_VARIABLE = "POLAFORMER_CACHE"
# Compiler options by what PyTorch's own functions use of the processor, for ATen's vectors to be as wide.
VECTORS = {
    "AVX512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -DCPU_CAPABILITY=AVX512 -DCPU_CAPABILITY_AVX512",
    "AVX2": "-mavx2 -mfma -mf16c -DCPU_CAPABILITY=AVX2 -DCPU_CAPABILITY_AVX2",
}
# Tokens of a task: a thread's sums of the moments are written for each.
LENGTH = 128


def library() -> Path:
    """Where the file for this source, processor and PyTorch is, or is to be."""
    capability = torch.backends.cpu.get_cpu_capability()
    key = hashlib.sha256(f"{torch.__version__} {VECTORS.get(capability)}".encode() + SOURCE.read_bytes()).hexdigest()
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    # stays as it is where no home directory is known: a user without entry and HOME, as containers start some
    folder = Path(os.path.expanduser(os.environ.get(FOLDER_VARIABLE) or f"{home}/polaformer"))
    return folder / f"polarity_attention-{capability.lower().replace(' ', '_')}-torch{torch.__version__}-{key[:12]}.so"


def reason_against(device: torch.device, dtype: torch.dtype, channels: int) -> str | None:
    """Why it cannot take tensors of this device, or None."""
    if device.type != "cpu":
        return f"it computes on a CPU, the queries are on {device.type}"
    return None if is_loaded() else f"{library()} is not there: `python -m {__package__}` builds it with a C++ compiler"


@cache
def is_loaded() -> bool:
    path = library()
    if not os.path.exists(path):  # Path's own raises where the folder cannot be entered
        return False
    if hasattr(torch.ops.polaformer_native, "features"):  # another copy of this package has loaded it
        return True
    try:
        torch.ops.load_library(path)
    except OSError as error:
        logger.warning("the native backend is left out: %s (remove that file, and build it again)", error)
        return False
    return True


def build() -> Path:
    """Compile native.cpp for this machine. Raises RuntimeError that says what is missing or what the compiler said."""
    capability = torch.backends.cpu.get_cpu_capability()
    if capability not in VECTORS:
        raise RuntimeError(f"this processor ({capability}) has none of {', '.join(VECTORS)}")
    compiler, *options = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    if shutil.which(compiler) is None:
        raise RuntimeError(f"{compiler} is not there: install a C++ compiler, or name one by CXX")
    home, path = Path(torch.__file__).parent, library()
    if path.parts[0].startswith("~"):
        raise RuntimeError(f"no home directory of this user is known: name a folder by {FOLDER_VARIABLE}")
    includes = (home / "include", home / "include/torch/csrc/api/include", sysconfig.get_paths()["include"])
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # whatever is interrupted leaves no half of a file
        made = Path(folder, path.name)
        command = [compiler, *options, "-O3", "-std=c++20", "-shared", "-fPIC", "-fopenmp", "-DNDEBUG"]
        command += [*VECTORS[capability].split(), *(f"-I{include}" for include in includes), str(SOURCE)]
        command += ["-o", str(made), f"-L{home / 'lib'}", "-lc10", "-ltorch_cpu"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise RuntimeError(f"{compiler} failed:\n{result.stderr.strip()[-2000:]}")
        made.replace(path)
    return path


class NativeBlocks(Blocks):
    """Divisions in one pass each."""

    backend = "native"

    def divide(
        self, numerators: Tensor, normalisers: Tensor, streams: Sequence[Stream], eps: float, out: Tensor
    ) -> None:
        torch.ops.polaformer_native.divide(numerators, normalisers, _ends(streams), eps, out, LENGTH)

    def divide_backward(
        self, numerators: Tensor, normalisers: Tensor, streams: Sequence[Stream], eps: float, grad: Tensor
    ) -> tuple[Tensor, Tensor]:
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        both = self.joined(numerators, normalisers)
        torch.ops.polaformer_native.divide_backward(numerators, normalisers, _ends(streams), eps, grad, both, LENGTH)
        grad_numerators, grad_normalisers = both.split([grad.shape[3], len(streams)], dim=-1)
        return grad_numerators, grad_normalisers

    def joined(self, numerators: Tensor, normalisers: Tensor) -> Tensor:
        """Where `divide_backward` has left both."""
        return self.scratch("grad_product", *numerators.shape[:3], numerators.shape[3] + normalisers.shape[3])


def _ends(streams: Sequence[Stream]) -> list[int]:
    return [stream.channels.stop - streams[0].channels.start for stream in streams]


class NativePolarityFeatures(PolarityFeatures):
    """Features and pull-back in one pass each; the tokens of a block are the block."""

    def __init__(self, scratch: Scratch, exponent: Tensor, scale: Tensor | None) -> None:
        super().__init__(scratch, exponent, scale)
        self.parameters = self.inverse_scale[:, 0].contiguous(), (self.exponent - 1)[:, 0].contiguous()

    def tokens(self, block: Tensor, padding: Tensor | None = None) -> Any:
        if padding is None and block.stride(-1) == 1:
            return block
        return fill(self.scratch("u", *block.shape).copy_(block), padding)

    def key_features(self, tokens: Any) -> Tensor:
        out = self.scratch("features", *tokens.shape[:-1], 2 * tokens.shape[-1])
        torch.ops.polaformer_native.features(tokens, *self.parameters, out, LENGTH)
        return out

    def key_backward(self, tokens: Any, features: Tensor, grad: Tensor) -> Tensor:
        b, h, T, d = tokens.shape
        out = self.scratch("grad_u", b, T, h, d).transpose(1, 2)
        moments = self.scratch("moments", b * math.ceil(T / LENGTH), 2, h, d).zero_()
        torch.ops.polaformer_native.features_backward(tokens, *self.parameters, grad, out, moments, LENGTH)
        moment, log_moment = moments.sum(dim=0)[:, :, None]
        self.moment += moment
        self.log_moment += math.log(2) * log_moment
        return out


def polarity_attention_native(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    exponent: Tensor,
    scale: Tensor | None,
    position: Tensor | None,
    key_mask: Tensor | None,
    eps: float,
) -> Tensor:
    """Arguments and result as in `polarity_attention`; differentiable once."""
    return linear_attention_eager(
        q, k, v, NativePolarityFeatures, (exponent, scale),
        position=position, key_mask=key_mask, eps=eps, blocks_of=NativeBlocks,
    )  # fmt: skip
