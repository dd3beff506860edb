"""What happens to an image: on the CPU up to uint8, on the device from there.

CPU: decode → crop, flip, automatic augmentation (training) or resize and centre crop (evaluation) → uint8 (3, H, W).
An image is Pillow's, a tensor (DATA.DECODER simplejpeg) or, while it is augmented, an array (AUG.BACKEND opencv).
Device: normalise → random erasing → mixup and CutMix (`TrainBatch`), or normalise alone (`Normalise`).
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, Mixup, create_transform
from timm.data.auto_augment import AugmentOp, AutoAugment, RandAugment
from timm.data.mixup import mixup_target
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torch.nn import functional as F
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import pil_to_tensor
from yacs.config import CfgNode

from data.sources.base import DataError, Picture, require_package

# Up to this IMG_SIZE, images that have it already are taken as they are: no resize in evaluation, a padded random crop
# in training.
SMALL_IMAGE = 32
FLIPS = (transforms.RandomHorizontalFlip, transforms.RandomVerticalFlip)
IMAGES = "images"  # the word of models.registry for what a body reads
_IMAGE_TO_UINT8 = transforms.PILToTensor()


class _BySize:
    """One step for images of (height, width), another for the rest."""

    def __init__(self, size: tuple[int, int], same: Callable, other: Callable) -> None:
        self.size, self.same, self.other = size, same, other

    def __call__(self, image: Picture) -> Picture:
        width, height = transforms.functional.get_image_size(image)
        return (self.same if (height, width) == self.size else self.other)(image)


def _keep(image: Picture) -> Picture:
    return image


def evaluation_transform(
    config: CfgNode, size: tuple[int, int], *, cropped: bool = False
) -> Callable[[Picture], Tensor]:
    """PIL image to uint8 (3, H, W) of `size`, which is (height, width) and below called IMG_SIZE.

    TEST.CROP: resize to 1/TEST.CROP_RATIO of IMG_SIZE and crop its centre, else resize to IMG_SIZE. The released models
    were evaluated with the aspect ratio squashed (TEST.RESIZE squash); `shorter` keeps it before a crop.

    Args:
        cropped: the images are centre crops already. Those of IMG_SIZE are taken as they are, others are resized to it.
    """
    mode = InterpolationMode(config.DATA.INTERPOLATION)
    if cropped or not config.TEST.CROP:
        fit: Callable = transforms.Resize(size, mode)
    else:
        enlarged = [int(side / config.TEST.CROP_RATIO) for side in size]
        squash = config.TEST.RESIZE == "squash"
        resize = transforms.Resize(enlarged, mode) if squash else _CoverResize(enlarged, mode)
        fit = transforms.Compose([resize, transforms.CenterCrop(size)])
    if max(size) <= SMALL_IMAGE:
        fit = _BySize(size, _keep, fit)
    return transforms.Compose([fit, _IMAGE_TO_UINT8])


class _CoverResize:
    """Resize, keeping the aspect ratio, to the smallest size that covers (height, width)."""

    def __init__(self, size: list[int], mode: InterpolationMode) -> None:
        self.size, self.mode = size, mode

    def __call__(self, image: Image.Image) -> Image.Image:
        height, width = self.size
        if height * image.width >= width * image.height:  # the height is what has to be enlarged most
            size = [height, max(int(height * image.width / image.height), width)]
        else:
            size = [max(int(width * image.height / image.width), height), width]
        return transforms.functional.resize(image, size, self.mode)


def training_transform(config: CfgNode, size: tuple[int, int]) -> Callable[[Picture], Tensor]:
    """RGB image to uint8 (3, H, W) of `size`: timm's random resized crop, flip, and augmentation or colour jitter.

    With DATA.DECODER simplejpeg images arrive as tensors and are cropped, resized and flipped as such; with AUG.BACKEND
    opencv the flip and the automatic augmentation work on arrays. Either way every step draws the same random numbers,
    so that only rounding and, in rotations, the filter differ.

    Raises:
        DataError: AUG.BACKEND cannot do what AUG.AUTO_AUGMENT asks for, or is not installed.
    """
    policy = config.AUG.AUTO_AUGMENT
    recipe = create_transform(
        input_size=size,
        is_training=True,
        use_prefetcher=True,  # normalisation and erasing run on the device
        scale=tuple(config.AUG.SCALE),
        ratio=tuple(config.AUG.RATIO),
        hflip=config.AUG.HFLIP,
        vflip=config.AUG.VFLIP,
        color_jitter=config.AUG.COLOR_JITTER,
        auto_augment=None if policy == "none" else policy,
        interpolation=config.DATA.INTERPOLATION,
        mean=tuple(config.DATA.MEAN),  # the colour of what rotations leave empty
    )
    crop, *steps = list(recipe.transforms)[:-1]
    fast = config.DATA.DECODER == "simplejpeg"
    if fast:
        crop = _TensorCrop(crop, config.DATA.INTERPOLATION)
    if max(size) <= SMALL_IMAGE:
        crop = _BySize(size, transforms.RandomCrop(size, padding=4), crop)
    if config.AUG.BACKEND == "opencv":
        return transforms.Compose([crop, *_on_arrays(steps, policy)])
    if fast:  # up to here, and for the flips that may follow, tensors will do
        steps.insert(sum(isinstance(step, FLIPS) for step in steps), _to_pillow)
    repair_posterize(steps)
    return transforms.Compose([crop, *steps, _IMAGE_TO_UINT8])


class _TensorCrop:
    """timm's random resized crop, resized by torch's antialiased filter; a tensor unless the filter is `nearest`."""

    def __init__(self, crop: RandomResizedCropAndInterpolation, interpolation: str) -> None:
        self.crop, self.interpolation = crop, interpolation

    def __call__(self, image: Picture) -> Picture:
        if self.interpolation == "nearest":  # torch picks other pixels than Pillow, which takes hardly any time here
            return self.crop(_to_pillow(image))
        pixels = image if isinstance(image, Tensor) else pil_to_tensor(image)
        top, left, height, width = self.crop.get_params(pixels, self.crop.scale, self.crop.ratio)
        region = pixels[None, :, top : top + height, left : left + width]
        region = region.contiguous(memory_format=torch.channels_last)  # the layout that torch resizes fastest
        rows, columns = self.crop.size
        if height - rows > max(0, 2 * (width - columns)):
            # Pillow 13 then resizes the height first; overshoots are cut off and rounded in between
            region = F.interpolate(region, (rows, width), mode=self.interpolation, antialias=True)
        return F.interpolate(region, (rows, columns), mode=self.interpolation, antialias=True)[0]


def _to_pillow(image: Picture) -> Image.Image:
    return image if isinstance(image, Image.Image) else Image.fromarray(image.permute(1, 2, 0).numpy())


def _on_arrays(steps: list[Callable], policy: str) -> list[Callable]:
    """Flip and automatic augmentation, which is AUG.AUTO_AUGMENT, by OpenCV: from a picture to uint8 (3, H, W).

    Raises DataError where OpenCV is not installed, or cannot do one of `steps`.
    """
    require_package("opencv")
    from data.opencv_operations import OPERATIONS, Flip, to_array, to_tensor  # imports the optional package

    flips = [Flip(step.p, FLIPS.index(type(step)) == 0) for step in steps if isinstance(step, FLIPS)]
    others = steps[len(flips) :]
    operations = list(_augment_operations(others))
    lacking = sorted({each.name for each in operations if each.aug_fn.__name__ not in OPERATIONS})
    lacking += [type(step).__name__ for step in others if not isinstance(step, RandAugment | AutoAugment)]
    if lacking:
        asked = (
            "AUG.COLOR_JITTER asks for where AUG.AUTO_AUGMENT is none"
            if policy == "none"
            else f"AUG.AUTO_AUGMENT {policy} asks for"
        )
        raise DataError(
            f"AUG.BACKEND opencv cannot do {', '.join(lacking)}, which {asked}; set"
            " AUG.BACKEND pillow, or another policy (rand-… without 3a, original, originalr, v0, v0r)"
        )
    for operation in operations:
        operation.aug_fn = OPERATIONS[operation.aug_fn.__name__]
    return [to_array, *flips, *others, to_tensor]


def _augment_operations(node: object) -> Iterator[AugmentOp]:
    """The AugmentOps of timm's policies, which hold them in lists under `ops` or `policy`."""
    if isinstance(node, AugmentOp):
        yield node
    elif isinstance(node, list | tuple):
        for child in node:
            yield from _augment_operations(child)
    else:
        for name in ("ops", "policy", "augmentations"):
            yield from _augment_operations(getattr(node, name, ()))


def repair_posterize(steps: list[Callable]) -> None:
    """Make timm's policies survive strengths at which they ask Pillow for something it refuses."""
    for operation in _augment_operations(steps):
        if operation.name.startswith("Posterize"):
            operation.aug_fn = _SafePosterize(operation.aug_fn)  # type: ignore[assignment, arg-type]  # inferred too narrowly


class _SafePosterize:
    """timm's posterize for every strength: Pillow 13 refuses 0 bits, which earlier versions rendered as black."""

    def __init__(self, posterize: Callable[..., Image.Image]) -> None:
        self.posterize = posterize

    def __call__(self, image: Image.Image, bits_to_keep: int, **parameters: object) -> Image.Image:
        if bits_to_keep < 1:
            return Image.new(image.mode, image.size)
        return self.posterize(image, bits_to_keep, **parameters)


# -- On the device


class Normalise:
    """uint8 (B, 3, H, W) to floating point with a mean and standard deviation, by default ImageNet's."""

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
    ) -> None:
        self.dtype = dtype
        # on the device once: a new tensor from Python numbers would wait for the GPU at every step
        self.mean, self.std = (
            torch.tensor(values, dtype=dtype, device=device).view(1, 3, 1, 1) for values in (mean, std)
        )

    @classmethod
    def of(cls, config: CfgNode, device: torch.device, dtype: torch.dtype = torch.float32) -> "Normalise":
        """With DATA.MEAN and DATA.STD."""
        return cls(device, dtype, config.DATA.MEAN, config.DATA.STD)

    def __call__(self, images: Tensor) -> Tensor:
        return (images.to(self.dtype) / 255 - self.mean) / self.std


def mixup_enabled(config: CfgNode) -> bool:
    """True where the AUG keys ask for mixup, CutMix or both; targets are then soft."""
    mixes = config.AUG.MIXUP > 0 or config.AUG.CUTMIX > 0 or config.AUG.CUTMIX_MINMAX is not None
    return mixes and config.AUG.MIXUP_PROB > 0


class TrainBatch:
    """uint8 images (B, 3, H, W) and labels (B,) to the model's input and target, on the images' device.

    The target is (B, classes) where mixup is enabled (label smoothing included), else the labels.
    """

    def __init__(
        self, config: CfgNode, num_classes: int, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        self.normalise = Normalise.of(config, device, dtype)
        self.num_classes = num_classes
        self.smoothing = config.MODEL.LABEL_SMOOTHING
        self.erase = RandomErasing(
            config.AUG.REPROB, mode=config.AUG.REMODE, max_count=config.AUG.RECOUNT, device=device.type
        )
        self.mixup = None
        if mixup_enabled(config):
            self.mixup = Mixup(
                mixup_alpha=config.AUG.MIXUP,
                cutmix_alpha=config.AUG.CUTMIX,
                cutmix_minmax=config.AUG.CUTMIX_MINMAX,
                prob=config.AUG.MIXUP_PROB,
                switch_prob=config.AUG.MIXUP_SWITCH_PROB,
                mode=config.AUG.MIXUP_MODE,
                label_smoothing=self.smoothing,
                num_classes=num_classes,
            )

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        images = self.erase(self.normalise(images))
        if self.mixup is None:
            return images, labels
        # Images are mixed in pairs; the last of an odd batch stays as it is.
        pairs = len(images) // 2 * 2
        targets = []
        if pairs:
            _, mixed = self.mixup(images[:pairs], labels[:pairs])  # timm mixes the images in place
            targets.append(mixed)
        if pairs < len(images):
            targets.append(mixup_target(labels[pairs:], self.num_classes, smoothing=self.smoothing))
        return images, torch.cat(targets).to(images.dtype)


class Images:
    """The modality of images: uint8 (B, 3, H, W) on the way, normalised and augmented on the device."""

    reads, noun = IMAGES, "images"
    function_keys: tuple[str, ...] = ("DATA.MEAN", "DATA.STD")

    def training_transform(self, config: CfgNode, size: tuple[int, int]) -> Callable[[Picture], Tensor]:
        return training_transform(config, size)

    def evaluation_transform(
        self, config: CfgNode, size: tuple[int, int], *, cropped: bool = False
    ) -> Callable[[Picture], Tensor]:
        return evaluation_transform(config, size, cropped=cropped)

    def train_batch(self, config: CfgNode, num_classes: int, device: torch.device, dtype: torch.dtype) -> TrainBatch:
        return TrainBatch(config, num_classes, device, dtype)

    def inputs(self, config: CfgNode, device: torch.device, dtype: torch.dtype) -> Normalise:
        return Normalise.of(config, device, dtype)

    def require(self, config: CfgNode) -> None:
        if config.MODEL.SWIN.IN_CHANS != 3:
            raise DataError(
                f"the image loaders deliver 3 channels, MODEL.SWIN.IN_CHANS is {config.MODEL.SWIN.IN_CHANS}"
            )
