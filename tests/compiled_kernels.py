"""Compile the Triton kernels ahead of time for a GPU that need not be there, and report what each needs, as JSON.

python tests/compiled_kernels.py --architectures 80 90 --channels 32 64 --dtypes bfloat16 float32

Runs in a process of its own, because the tests' process imports the kernels for the interpreter.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from models.ops.polarity_attention import triton as kernels
from models.ops.polarity_attention import triton_op

KERNELS = ("state_kernel", "output_kernel", "query_backward_kernel", "key_backward_kernel")
TYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
TENSORS = {"q", "k", "v", "out", "grad_out", "grad_q", "grad_k", "grad_v"}  # in the dtype of the call
FLOATS = {"exponent", "scale", "position", "state", "grad_state", "log_moments", "inverse_count"}
SIZES = {"N", "n", "images", "parts", "tokens_per_part"}
STRIDES = ("_image", "_token", "_head")
HEADS = 3


def compile_kernel(
    name: str, architecture: int, channels: int, dtype: str, everything: bool, ones: bool = False
) -> dict[str, Any]:
    """Compile one kernel; `everything` includes scale, position and key mask.

    ones: every size, number of parts and stride is 1, which the launcher makes a constant of the kernel.
    """
    kernel = getattr(kernels, name)
    options = triton_op.launch_options(kernel, channels, getattr(torch, dtype), architecture)
    warps, stages = options.pop("num_warps"), options.pop("num_stages")
    constants = {**options, "H": HEADS}
    signature = {}
    for argument in kernel.arg_names:
        if argument.startswith("HAS_"):
            constants[argument] = everything
        if ones and (argument in SIZES or argument.endswith(STRIDES)):
            constants[argument] = 1
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in TENSORS:
            signature[argument] = f"*{TYPES[dtype]}"
        elif argument in FLOATS:
            signature[argument] = "*fp32"
        elif argument == "key_mask":
            signature[argument] = "*i1"
        else:
            signature[argument] = "fp32" if argument == "eps" else "i32"
    # what the launcher finds at the models' shapes: aligned pointers and strides
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, argument in enumerate(kernel.arg_names)
        if signature[argument].startswith("*") or (argument.endswith(STRIDES) and not ones)
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(
        source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": warps, "num_stages": stages}
    )
    return {
        "kernel": name, "architecture": architecture, "channels": channels, "dtype": dtype, "warps": warps,
        "shared": compiled.metadata.shared, **_usage(compiled.asm["cubin"]),
    }  # fmt: skip


def _usage(cubin: bytes) -> dict[str, Any]:
    """What a thread holds, the tensor-core instructions and the maxima, read from the machine code."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        code = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found, f"cuobjdump printed no resource usage:\n{usage}"
    registers, stack, local = map(int, found.groups())
    spills = len(re.findall(r"\b(?:STL|LDL)\b", code))
    tensor_core = sorted(set(re.findall(r"\b(HGMMA|HMMA)\.\S+", code)))
    types = sorted(set(re.findall(r"\bH(?:G)?MMA\.\S*?(BF16|TF32)", code)))
    maxima = sorted(set(re.findall(r"\b[FH]MNMX2?\S*", code)))
    return {
        "registers": registers,
        "stack": stack,
        "local": local,
        "local_accesses": spills,
        "tensor_core": tensor_core,
        "types": types,
        "maxima": maxima,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", type=int, nargs="+", default=[80, 90])
    parser.add_argument("--channels", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--dtypes", nargs="+", choices=TYPES, default=list(TYPES))
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--plain", action="store_true", help="without scale, position and key mask")
    parser.add_argument("--ones", action="store_true", help="every size and stride is 1")
    arguments = parser.parse_args()
    for architecture in arguments.architectures:
        for dtype in arguments.dtypes:
            for channels in arguments.channels:
                for name in arguments.kernels:
                    record = compile_kernel(name, architecture, channels, dtype, not arguments.plain, arguments.ones)
                    print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
