"""Entry points of torch.hub: torch.hub.load(REPOSITORY, "pola_swin_tiny", source="local", checkpoint="FILE.pth")

The folder models/ is loaded under the name of the package, `polaformer`, whatever else is called `models` where
torch.hub is used; a `polaformer` that is imported already is taken as it is.
"""

import sys
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

dependencies = ["torch", "torchvision", "timm", "einops", "safetensors", "yaml"]


def _library() -> ModuleType:
    if "polaformer" not in sys.modules:
        folder = Path(__file__).resolve().parent / "models"
        spec = spec_from_file_location("polaformer", folder / "__init__.py", submodule_search_locations=[str(folder)])
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules["polaformer"] = module_from_spec(spec)  # its files import it while it is executed
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules["polaformer"]
            raise
    return sys.modules["polaformer"]


_polaformer = _library()
for _name in _polaformer.list_models():
    globals()[_name] = partial(_polaformer.create_model, _name)
    globals()[_name].__doc__ = f"{_name}: {_polaformer.create_model.__doc__}"
