"""Vision transformers with polarity-aware linear attention: models, the attention op, and reading of their files.

The folder is `models` beside main.py and the package `polaformer` after `pip install .` or through torch.hub. Importing
it registers every variant with timm, so that `timm.create_model("pola_swin_tiny")` finds it.

    import polaformer
    model = polaformer.load("FILE.pth")          # a released file or one of ours, rebuilt from the file alone
    polaformer.polarity_attention(q, k, v, exponent)
"""

from importlib import import_module
from pkgutil import iter_modules

from .files import CheckpointError
from .loading import create_model, load
from .ops.polarity_attention import polarity_attention
from .registry import build_model, list_models, model_arguments

for _file in iter_modules(__path__):  # a body registers itself
    import_module(f"{__name__}.{_file.name}")

__all__ = [
    "CheckpointError",
    "build_model",
    "create_model",
    "list_models",
    "load",
    "model_arguments",
    "polarity_attention",
]
