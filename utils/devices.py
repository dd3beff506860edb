"""What a process computes on, and what that lacks: an accelerator (CUDA or, by the same name, ROCm; Apple's MPS;
Intel's XPU) where torch finds one, or the CPU.

Whoever needs what a device may lack asks here, and does without.
"""

import math
import sys

import torch

PINNING = ("cuda", "xpu")  # copy from page-locked memory while the host goes on
SUPPRESSING = ("cpu", "cuda", "xpu")  # have fused optimizers that are known to leave a step out by themselves


def device_type(name: str = "auto") -> str:
    """The kind of device that a name asks for. Raises ValueError where it is not there."""
    found = torch.accelerator.current_accelerator(check_available=True)
    there = ["cpu"] if found is None else [found.type, "cpu"]
    if name != "auto" and name not in there:
        raise ValueError(f"DEVICE {name} (--device) cannot be used here: there is {' and '.join(there)}")
    return there[0] if name == "auto" else name


def described(device: torch.device) -> str:
    """The device's name, and how many threads a CPU has."""
    if device.type == "cpu":
        return f"CPU ({torch.get_num_threads()} threads)"
    named = getattr(torch.get_device_module(device), "get_device_name", None)
    return named(device) if named else device.type.upper()


def widest(device: torch.device) -> torch.dtype:
    """The widest floating-point type: sums over many numbers are in it."""
    return torch.float32 if device.type == "mps" else torch.float64


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device itself computes in bfloat16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "xpu":
        return torch.xpu.is_bf16_supported()
    return device.type != "mps" or torch.backends.mps.is_macos_or_newer(14, 0)


def lacks(device: torch.device) -> str:
    """One phrase on what is done without on this device; empty where that is nothing."""
    without = {
        "float64 (sums are float32)": widest(device) != torch.float64,
        "bfloat16 (AMP_DTYPE auto is float16)": not has_bfloat16(device),
        "page-locked memory": device.type not in (*PINNING, "cpu"),
        "optimizers that leave a step out by themselves (the host looks at each step)": device.type not in SUPPRESSING,
    }
    return ", ".join(what for what, lacking in without.items() if lacking)


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def peak_memory_mb(device: torch.device) -> float:
    """Largest memory use so far in MiB: allocated on a GPU, resident on a CPU; NaN where the system does not say."""
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 2**20  # of now: it keeps no peak
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated(device) / 2**20
    try:
        import resource  # Windows has none
    except ImportError:
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
