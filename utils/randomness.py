"""Seeding, and the state of every generator as plain values and tensors that a checkpoint can hold."""

import os
import random
from typing import Any

import numpy as np
import torch

from utils.devices import device_type


def seed_everything(seed: int, *more: int) -> None:
    """Seed Python, NumPy and torch (CPU and GPU) from `seed` and further integers, such as rank and epoch."""
    words = np.random.SeedSequence((seed, *more)).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.manual_seed(int(words[2]))


def deterministic() -> None:
    """Only algorithms that give the same bits every time; one that has no such form warns and runs as it is."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS asks for
    torch.use_deterministic_algorithms(True, warn_only=True)


def generator_states() -> dict[str, Any]:
    """The states of this process's generators."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    states: dict[str, Any] = {
        "python": [version, list(words), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
    }
    if torch.accelerator.is_available():
        states[device_type()] = torch.get_device_module().get_rng_state()
    return states


def restore_generators(states: dict[str, Any]) -> None:
    """Put this process's generators back to `generator_states`."""
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["torch"])
    if torch.accelerator.is_available() and device_type() in states:
        torch.get_device_module().set_rng_state(states[device_type()])
