"""Names of classes for people: ImageNet's words for WordNet ids, else the names that the data set gave."""

from collections.abc import Sequence

from data.imagenet import are_wordnet_ids, class_words, imagenet_ids


def readable_names(classes: Sequence[str] | None, num_classes: int) -> list[str]:
    """One name a class. `classes` are those that the checkpoint stores, in the order of its head.

    1,000 classes without names are ImageNet's, in the order of their WordNet ids; other ones are numbered.
    """
    if classes is None:
        if num_classes != len(imagenet_ids()):
            return [f"class {label}" for label in range(num_classes)]
        classes = imagenet_ids()
    if not are_wordnet_ids(classes):
        return list(classes)
    words = class_words()
    return [words.get(name, name) for name in classes]
