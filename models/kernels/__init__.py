"""A kernel is a file of this folder: what a paper of this family changes about attention.

`KERNELS` names them for MODEL.LA.ATTENTION, and is the only list; importing this package imports every file of it.
"""

from importlib import import_module
from pkgutil import iter_modules

from .base import KERNELS, Kernel, LinearKernel, kernel_of, register_kernel

for _file in iter_modules(__path__):
    import_module(f"{__name__}.{_file.name}")

__all__ = ["KERNELS", "Kernel", "LinearKernel", "kernel_of", "register_kernel"]
