"""What the Triton kernels of polarity attention cost by their machine code, without a GPU: python -m benchmarks.kernels

Every kernel is compiled ahead of time, with scale and position, as the launcher would for aligned tensors, and its code
is read: the loop over tiles is the longest backward branch, and each instruction between its ends counts as issued once
an iteration, by each warp. Per element: times the threads of a program, over the channels and tokens of a tile.

The estimate of a kernel's time is the largest of three, with the constants of DEVICES and ISSUE_INTERVAL:

- issue: a multiprocessor has ISSUE_SLOTS instructions a cycle, and a warp fills one in ISSUE_INTERVAL cycles at best,
  as a chain of dependent arithmetic does; so few resident warps leave slots empty. A program issues its instructions
  outside of the loop once and those inside once a tile. Programs come in waves of as many as fit all multiprocessors
  by registers, shared memory and warps; the last wave is shared out evenly;
- special functions (MUFU): SPECIAL_LANES results a cycle and multiprocessor;
- memory: the tokens' tensors once, at the rate of a copy. Their sum is the floor, 4 tensors forward and 7 backward.

Not in it: launches, the reductions over parts, stalls of barriers, of memory and of tensor cores. So it is no
prediction: it says which of two kernels is nearer to the floor, and what holds it.
"""

import argparse
import itertools
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks import common
from benchmarks.common import DTYPES, Bar, Outcome
from models.ops.linear_attention import gated, triton_local, triton_op
from models.ops.linear_attention import triton as kernels

# Each kernel and the tensors of tokens that it reads and writes once.
PASSES = {"state": 2, "output": 2, "query_backward": 3, "key_backward": 4}
# Those of the convolution and the gate around it (models/ops/linear_attention/gated.py), of 5×5 places.
LOCAL_PASSES, PLACES = {"local": 5, "local_backward": 3}, 25
DIRECTIONS = {
    "forward": ("state", "output"),
    "backward": ("query_backward", "key_backward"),
    "convolution and gate": ("local", "local_backward"),
}
SHAPES = (
    (128, 3136, 3, 32), (128, 784, 6, 32), (32, 4096, 2, 32),
    (128, 3136, 1, 64), (128, 196, 5, 64), (128, 49, 8, 64),
)  # fmt: skip
# What the project set itself for bfloat16 on sm_90: instructions per element, by channels, in the order of PASSES.
INSTRUCTION_BARS = {32: (20, 22, 45, 40), 64: (22, 19, 50, 43)}
WARPS_BAR, BARRIER_BAR = 12, 6


@dataclass(frozen=True)
class Device:
    """Of an architecture: the clock by which its peak rates are stated (Hz), bytes per second of a copy (H200:
    measured; the others: nine tenths of the data sheet), bytes of shared memory of a multiprocessor."""

    name: str
    multiprocessors: int
    clock: float
    copy_rate: float
    shared: int


DEVICES = {
    80: Device("A100", 108, 1.41e9, 1.8e12, 164 * 1024),
    90: Device("H200", 132, 1.83e9, 4.3e12, 228 * 1024),
    100: Device("B200", 148, 1.85e9, 7.2e12, 228 * 1024),
}
# The same on all three.
ISSUE_SLOTS, ISSUE_INTERVAL, SPECIAL_LANES = 4, 4, 16
REGISTERS, WARPS, PROGRAMS, RESERVED_SHARED = 65536, 64, 32, 1024

# -- Compiling

TYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
TENSORS = {  # in the dtype of the call
    "q", "k", "v", "out", "gate", "result", "grad", "grad_out", "grad_q", "grad_k", "grad_v",
}  # fmt: skip
FLOATS = {
    "first", "second", "position", "state", "grad_state", "moments", "inverse_count", "cos", "sin",
    "weight", "bias", "sums",
}  # fmt: skip
SIZES = {"N", "n", "images", "parts", "tokens_per_part"}
STRIDES = ("_image", "_token", "_head")
HEADS = 3


def compile_kernel(
    name: str,
    architecture: int,
    channels: int,
    dtype: str,
    *,
    feature_map: str = "power",
    mask: bool = False,
    ones: bool = False,
) -> dict[str, Any]:
    """Compile one kernel, with scale and position, or of other maps with turns, and say what its machine code needs.

    ones: every size, number of parts and stride is 1, which the launcher makes a constant of the kernel.
    """
    kernel = getattr(kernels if name in PASSES else triton_local, f"{name}_kernel")
    if name in PASSES:
        options = triton_op.launch_options(kernel, channels, DTYPES[dtype], architecture, feature_map)
    else:
        options = gated.launch_options(channels, kernel_size=5)
    settings = {key: options.pop(key) for key in ("num_warps", "num_stages", "maxnreg") if key in options}
    constants = {**options, **_constants(name, channels, feature_map, mask)}
    if ones:
        constants |= {argument: 1 for argument in kernel.arg_names if argument in SIZES or argument.endswith(STRIDES)}
    signature = {argument: _type_of(argument, dtype, constants) for argument in kernel.arg_names}
    # what the launcher finds at the models' shapes: aligned pointers and strides
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (argument, kind) in enumerate(signature.items())
        if kind.startswith("*") or (argument.endswith(STRIDES) and not ones)
    }
    constants = {argument: value for argument, value in constants.items() if argument in signature}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=settings)
    record = {
        "kernel": name, "map": feature_map, "architecture": architecture, "channels": channels, "dtype": dtype,
        "tile": options["T"], "warps": settings["num_warps"], "shared": compiled.metadata.shared,
        **_resources(compiled.asm["cubin"]),
    }  # fmt: skip
    if name == "local":  # one tile a program, whose loop is over places
        record |= {"loop": record["outside"] + PLACES * record["loop"], "outside": 0}
    elif name == "local_backward":
        record["loop"] += (PLACES - 1) * record["inner"]
    elements = options["T"] * channels / (32 * settings["num_warps"])  # of a tile, for each thread
    return record | {
        "programs": _resident_programs(record),
        "instructions_per_element": record["loop"] / elements,
        "special_per_element": record["special"] / elements,
    }


def _constants(name: str, channels: int, feature_map: str, mask: bool) -> dict[str, Any]:
    """What the launcher makes constants of a kernel: flags, and None for tensors that are not there."""
    power, is_local = feature_map == "power", name in LOCAL_PASSES
    border = triton_op.border(feature_map, channels)
    flags = {"MAP": feature_map, "H": HEADS, "BORDER": border, "ALPHA": None, "ROW": HEADS * channels}
    flags |= {"HAS_POSITION": power, "HAS_TURNS": not power, "HAS_MASK": mask, "HAS_GATE": is_local, "HAS_LOCAL": False}
    absent = {"cos", "sin"} if power else {"position"}
    absent |= {"first", "second", "moments"} if feature_map == "norm" else set()
    absent |= set() if mask else {"key_mask", "inverse_count"}
    if not is_local:
        absent |= {"gate", "ungated", "grad_gate", "gated"}
        flags |= {"gate_image": 1, "gate_token": 1, "gate_head": 1}
    return flags | dict.fromkeys(absent)


def _type_of(argument: str, dtype: str, constants: Mapping[str, Any]) -> str:
    if argument in constants:
        return "constexpr"
    if argument in TENSORS:
        return f"*{TYPES[dtype]}"
    if argument in FLOATS:
        return "*fp32"
    return {"key_mask": "*i1", "eps": "fp32"}.get(argument, "i32")


def _resources(cubin: bytes) -> dict[str, Any]:
    """What a thread holds, and the instructions, read from the machine code by the tools that Triton brings."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found, f"cuobjdump printed no resource usage:\n{usage}"
    registers, stack, local = map(int, found.groups())
    return {"registers": registers, "stack": stack, "local": local, **count_instructions(code)}


def count_instructions(code: str) -> dict[str, Any]:
    """Of a kernel's machine code as cuobjdump prints it.

    loop, outside: instructions in the loop over tiles and elsewhere; of the loop: those of the longest loop inside of
    it, special functions, barriers of the whole program, and how often each kind of matrix product is started; of all:
    accesses to spilled values, maxima.
    """
    lines = [
        (int(address, 16), text) for address, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(\S.*?)\s*;\s+/\*", code)
    ]
    targets = [(address, re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)) for address, text in lines]
    jumps = [(int(target[1], 16), address) for address, target in targets if target]
    backward = [(to, at) for to, at in jumps if to < at]  # none where sizes are constants that make one tile
    loops = sorted(backward, key=lambda jump: jump[0] - jump[1])  # the longest first
    first, last = loops[0] if loops else (-1, -1)
    inner = next(((to, at) for to, at in loops[1:] if first <= to and at < last), None)
    names = [re.sub(r"^@!?U?P\w+\s+", "", text).split()[0] for _, text in lines]
    loop = [name for (address, _), name in zip(lines, names, strict=True) if first <= address <= last]
    return {
        "loop": len(loop),
        "outside": len(names) - len(loop),
        "inner": 0 if inner is None else sum(inner[0] <= address <= inner[1] for address, _ in lines),
        "special": sum(name.startswith("MUFU") for name in loop),
        "barriers": sum(name.startswith("BAR.") for name in loop),
        "products": Counter(name for name in loop if re.match(r"(HGMMA|HMMA|UTC\w*MMA)\b", name)),
        "spill_accesses": sum(name.split(".")[0] in ("STL", "LDL") for name in names),
        "maxima": sorted({name for name in names if re.match(r"[FH]MNMX", name)}),
    }


def _resident_programs(record: Mapping[str, Any]) -> int:
    """How many programs a multiprocessor holds at a time: a warp's registers are given out by 256."""
    registers = -(-record["registers"] * 32 // 256) * 256 * record["warps"]
    shared = DEVICES[record["architecture"]].shared // (record["shared"] + RESERVED_SHARED)
    return min(REGISTERS // registers, shared, WARPS // record["warps"], PROGRAMS)


# -- Estimating


def estimate(record: Mapping[str, Any], shape: tuple[int, int, int, int]) -> dict[str, Any]:
    """Seconds that the kernel takes of (images, tokens, heads, channels), by each of the three limits."""
    images, tokens, heads, channels = shape
    device = DEVICES[record["architecture"]]
    parts, length = _parts(record, shape)
    programs, tiles = images * heads * parts, -(-length // record["tile"])
    issued = record["warps"] * (record["outside"] + tiles * record["loop"])
    slots = record["programs"] * device.multiprocessors
    full, rest = divmod(programs, slots)
    cycles = full * _cycles(issued, record["programs"], record["warps"])
    cycles += _cycles(issued, -(-rest // device.multiprocessors), record["warps"])
    special = programs * tiles * record["special"] * record["warps"] * 32 / SPECIAL_LANES / device.multiprocessors
    element = DTYPES[record["dtype"]].itemsize
    seconds = {
        "issue": cycles / device.clock,
        "special": special / device.clock,
        "memory": (PASSES | LOCAL_PASSES)[record["kernel"]]
        * images
        * tokens
        * heads
        * channels
        * element
        / device.copy_rate,
    }
    limit = max(seconds, key=lambda name: seconds[name])
    return {
        "kernel": record["kernel"], "architecture": record["architecture"], "dtype": record["dtype"], "shape": shape,
        "waves": programs / slots, "seconds": seconds[limit], "limit": limit, "floor": seconds["memory"],
    }  # fmt: skip


def _parts(record: Mapping[str, Any], shape: tuple[int, int, int, int]) -> tuple[int, int]:
    """Parts of a sequence and tokens of each, as the launcher chooses them."""
    images, tokens, heads, _ = shape
    if record["kernel"] in ("state", "query_backward"):
        resident = triton_op.RESIDENT_PROGRAMS[getattr(kernels, f"{record['kernel']}_kernel")][record["channels"]]
        slots = resident * DEVICES[record["architecture"]].multiprocessors
        parts = triton_op.parts_of_a_sum(tokens, images * heads, slots)
        return parts, triton.cdiv(tokens, parts)
    if record["kernel"] in PASSES:
        return triton_op.plain_parts(tokens, record["tile"])
    return triton.cdiv(tokens, record["tile"]), record["tile"]


def _cycles(issued: int, programs: int, warps: int) -> float:
    """Of one multiprocessor that holds so many programs, each of which issues `issued` instructions."""
    if programs == 0:
        return 0.0
    return programs * issued / min(ISSUE_SLOTS, programs * warps / ISSUE_INTERVAL)


# -- The program


def compile_all(options: argparse.Namespace) -> Iterable[dict[str, Any]]:
    for architecture, dtype, channels, name in itertools.product(
        options.architectures, options.dtypes, options.channels, options.kernels
    ):
        flags = {"feature_map": options.map, "mask": options.mask, "ones": options.ones}
        yield compile_kernel(name, architecture, channels, dtype, **flags)


def measure(options: argparse.Namespace) -> Outcome:
    """All kernels asked for, with a table of them and one of estimated times."""
    records = list(compile_all(options))
    rows = []
    for r in records:
        name = f"sm_{r['architecture']} {r['dtype']} {r['kernel']}, {r['channels']}"
        counts = (f"{r['instructions_per_element']:.1f}", f"{r['special_per_element']:.2f}")
        products = " ".join(f"{count}×{kind}" for kind, count in r["products"].items())
        needs = (f"{r[key]}" for key in ("registers", "shared", "stack"))
        resident = f"{r['programs']} ({r['programs'] * r['warps']})"
        rows.append((name, *counts, products, *needs, resident, f"{r['barriers']}"))
    header = ("kernel, d", "instructions per element", "MUFU", "products in the loop", "registers", "shared", "spilled")
    common.print_table("Machine code", (*header, "programs (warps) per SM", "barriers in the loop"), rows)
    estimates = [estimate(r, shape) for r in records for shape in SHAPES if shape[3] == r["channels"]]
    _print_estimates(estimates)
    return Outcome({"triton": triton.__version__, "kernels": records, "estimates": estimates}, _bars(records))


def _print_estimates(estimates: list[dict[str, Any]]) -> None:
    rows = []
    for (architecture, dtype), shape, (direction, names) in itertools.product(
        dict.fromkeys((e["architecture"], e["dtype"]) for e in estimates), SHAPES, DIRECTIONS.items()
    ):
        key = (architecture, dtype, shape)
        found = [e for e in estimates if (e["architecture"], e["dtype"], e["shape"]) == key and e["kernel"] in names]
        if len(found) == len(names):
            total, floor = (sum(e[name] for e in found) for name in ("seconds", "floor"))
            each = ", ".join(f"{1e6 * e['seconds']:.0f} ({e['limit']}, {e['waves']:.2f} waves)" for e in found)
            device = f"{DEVICES[architecture].name} {dtype}"
            sums = (f"{1e6 * total:.0f}", f"{1e6 * floor:.0f}", f"{total / floor:.1f}")
            rows.append((device, f"{shape}", direction, each, *sums))
    header = ("device", "(B, N, h, d)", "pass", "each kernel", "sum", "memory floor", "× floor")
    common.print_table("Estimated microseconds", header, rows)


def _bars(records: Iterable[Mapping[str, Any]]) -> list[Bar]:
    bars = []
    for record in records:
        if (record["architecture"], record["dtype"]) != (90, "bfloat16") or record["channels"] not in INSTRUCTION_BARS:
            continue
        if record["kernel"] in LOCAL_PASSES:
            continue
        what = f"{record['kernel']} at {record['channels']} channels: "
        bound = INSTRUCTION_BARS[record["channels"]][list(PASSES).index(record["kernel"])]
        bars += [
            Bar(f"{what}instructions per element", record["instructions_per_element"], bound, "at most"),
            Bar(f"{what}warps per SM", record["programs"] * record["warps"], WARPS_BAR),
            Bar(f"{what}bytes spilled by a thread", record["stack"], 0, "at most"),
        ]
        if record["kernel"] in DIRECTIONS["forward"]:
            bars.append(Bar(f"{what}barriers in the loop", record["barriers"], BARRIER_BAR, "at most"))
    return bars


def main() -> None:
    parser = common.argument_parser("kernels", __doc__, threads=1)
    parser.add_argument("--architectures", type=int, nargs="+", choices=DEVICES, default=list(DEVICES))
    parser.add_argument("--channels", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--dtypes", nargs="+", choices=TYPES, default=["bfloat16"])
    parser.add_argument("--kernels", nargs="+", choices=[*PASSES, *LOCAL_PASSES], default=[*PASSES, *LOCAL_PASSES])
    parser.add_argument("--map", choices=triton_op.MOMENTS, default="power", help="the feature map")
    parser.add_argument("--mask", action="store_true", help="with a key mask")
    parser.add_argument("--ones", action="store_true", help="every size and stride is 1")
    parser.add_argument("--records", action="store_true", help="print one JSON line a kernel and write no file")
    options = parser.parse_args()
    if triton_op.is_interpreted():
        raise SystemExit("TRITON_INTERPRET is set, so that kernels are interpreted; unset it to compile them")
    if options.records:
        for record in compile_all(options):
            print(json.dumps(record), flush=True)
    else:
        common.run(options, measure, recorded="architectures channels dtypes", variant=f"-triton-{triton.__version__}")


if __name__ == "__main__":
    main()
