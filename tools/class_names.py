"""Names of classes for people: ImageNet's words for WordNet ids, else the names that the data set gave."""

from collections.abc import Sequence

from timm.data import ImageNetInfo

from tools.imagenet_labels import WORDNET_ID

IMAGENET_CLASSES = 1000


def readable_names(classes: Sequence[str] | None, num_classes: int) -> list[str]:
    """One name a class. `classes` are those that the checkpoint stores, in the order of its head.

    1,000 classes without names are ImageNet's, in the order of their WordNet ids; other ones are numbered.
    """
    if classes is None:
        if num_classes != IMAGENET_CLASSES:
            return [f"class {label}" for label in range(num_classes)]
        classes = ImageNetInfo().label_names()
    if not all(WORDNET_ID.fullmatch(name) for name in classes):
        return list(classes)
    imagenet = ImageNetInfo()
    words = dict(zip(imagenet.label_names(), imagenet.label_descriptions(), strict=True))
    return [words.get(name, name) for name in classes]
