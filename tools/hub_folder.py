"""What a Hugging Face Hub folder says about a model: timm's config.json and a model card."""

from pathlib import Path
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from yacs.config import CfgNode

from config import image_size, load_config
from models import model_arguments
from tools.class_names import readable_names

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
# timm's names of the official configurations.
ARCHITECTURES = {
    "pola_swin_tiny": "pola_swin_t",
    "pola_swin_small": "pola_swin_s",
    "pola_swin_base": "pola_swin_b",
    "pola_swin_base_384": "pola_swin_b_384",
    "pola_pvt_tiny": "pola_pvt_t",
    "pola_pvt_small": "pola_pvt_s",
    "pola_pvt_medium": "pola_pvt_m",
    "pola_pvt_large": "pola_pvt_b",
}
# Arguments that do not change what a trained model computes.
TRAINING_ARGUMENTS = ("proj_drop_rate", "drop_path_rate", "backend")
PAPER = "https://arxiv.org/abs/2501.15061"


def _arguments(config: CfgNode) -> dict[str, Any]:
    return {name: value for name, value in model_arguments(config).items() if name not in TRAINING_ARGUMENTS}


def architecture_of(config: CfgNode) -> tuple[str, dict[str, Any]]:
    """timm's name of a configuration's model, and the arguments by which it differs from what that name builds.

    A model that is none of the official ones is a pola_swin_tiny, or the Pola-PVT of its depths, with every argument.
    """
    own = _arguments(config)
    for name, file in ARCHITECTURES.items():
        official = load_config(str(CONFIGS / f"{file}.yaml"))
        if official.MODEL.TYPE == config.MODEL.TYPE and _arguments(official) == own:
            return name, {}
    return ("pola_swin_tiny" if config.MODEL.TYPE == "pola_swin" else config.MODEL.TYPE), own


def hub_config(config: CfgNode, num_features: int, classes: list[str] | None) -> dict[str, Any]:
    """config.json as timm reads it. The evaluation transform is that of TEST.CROP and TEST.RESIZE."""
    architecture, arguments = architecture_of(config)
    is_swin = config.MODEL.TYPE == "pola_swin"
    content: dict[str, Any] = {
        "architecture": architecture,
        "num_classes": config.MODEL.NUM_CLASSES,
        "num_features": num_features,
        "global_pool": "avg",
    }
    if classes:
        content["label_names"] = classes
        words = readable_names(classes, len(classes))
        if words != classes:
            content["label_descriptions"] = dict(zip(classes, words, strict=True))
    if arguments:
        content["model_args"] = arguments
    content["pretrained_cfg"] = {
        "input_size": [config.MODEL.SWIN.IN_CHANS, *image_size(config)],
        "fixed_input_size": True,
        "interpolation": config.DATA.INTERPOLATION,
        "crop_pct": config.TEST.CROP_RATIO if config.TEST.CROP else 1.0,
        "crop_mode": "center" if config.TEST.CROP and config.TEST.RESIZE == "shorter" else "squash",
        "mean": list(IMAGENET_DEFAULT_MEAN),
        "std": list(IMAGENET_DEFAULT_STD),
        "num_classes": config.MODEL.NUM_CLASSES,
        "pool_size": None,
        "first_conv": "patch_embed.proj" if is_swin else "patch_embed1.proj",
        "classifier": "head",
    }
    return content


def model_card(name: str, config: CfgNode, hub: dict[str, Any], parameters: int, metadata: dict[str, str]) -> str:
    """README.md of the folder: what the model is, how it is loaded, what it was made from. It claims no accuracy."""
    height, width = image_size(config)
    family = "Pola-Swin" if config.MODEL.TYPE == "pola_swin" else "Pola-PVT"
    weights = "the average of the weights over training (EMA)" if metadata["weights"] == "model_ema" else "the weights"
    return f"""---
tags:
- image-classification
- timm
pipeline_tag: image-classification
library_name: timm
license: mit
---
# {name}

A {family} image classifier: a vision transformer with polarity-aware linear attention
([PolaFormer, ICLR 2025]({PAPER})).

| | |
|---|---|
| architecture | `{hub["architecture"]}`{" with `model_args`" if "model_args" in hub else ""} |
| parameters | {parameters / 1e6:.2f} M |
| input | {height}×{width} pixels, normalised with ImageNet's mean and standard deviation |
| classes | {hub["num_classes"]} |
| made from | {weights} of `{metadata["source"]}` (SHA-256 `{metadata["source_sha256"]}`) |
| PolaFormer version | {metadata["version"]} |

## Use

In a checkout of the PolaFormer repository, whose `models` registers the architectures with timm:

```python
import timm
from PIL import Image

import models

model = timm.create_model("local-dir:THIS_FOLDER", pretrained=True).eval()  # or hf-hub:USER/NAME
transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
logits = model(transform(Image.open("image.jpg").convert("RGB"))[None])
```

`model.safetensors` also carries the training configuration and the class names:
`python tools/predict.py --checkpoint model.safetensors image.jpg` needs nothing else.

## Citation

```bibtex
@inproceedings{{meng2025polaformer,
  title     = {{PolaFormer: Polarity-aware Linear Attention for Vision Transformers}},
  author    = {{Meng, Weikang and Luo, Yadan and Li, Xin and Jiang, Dongmei and Zhang, Zheng}},
  booktitle = {{International Conference on Learning Representations (ICLR)}},
  year      = {{2025}}
}}
```
"""
