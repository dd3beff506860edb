"""Entry points of torch.hub: torch.hub.load(REPOSITORY, "pola_swin_tiny", source="local", checkpoint="FILE.pth")"""

from functools import partial

from models import list_models as _list_models
from models.loading import create_model as _create_model

dependencies = ["torch", "torchvision", "timm", "einops", "yacs", "termcolor"]

for _name in _list_models():
    globals()[_name] = partial(_create_model, _name)
    globals()[_name].__doc__ = f"{_name}: {_create_model.__doc__}"
