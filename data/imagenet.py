"""ImageNet's classes by WordNet id, in the order that released models were trained in. Imports nothing heavy."""

import re
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

WORDNET_ID = re.compile(r"n\d{8}")


def _list(name: str) -> list[str]:
    """Lines of one of the lists that timm brings; timm itself is slow to import."""
    spec = find_spec("timm")
    assert spec, "timm is a requirement"
    path = Path(str(spec.origin)).parent / "data" / "_info" / name
    return path.read_text(encoding="utf-8").splitlines()


@cache
def imagenet_ids() -> tuple[str, ...]:
    """The WordNet ids of the 1,000 classes, sorted, as their labels are."""
    return tuple(sorted(_list("imagenet_synsets.txt")))


@cache
def class_words() -> dict[str, str]:
    """What classes are called, by WordNet id: those of ImageNet, and of the whole of ImageNet-22k."""
    return dict(line.split("\t", 1) for line in _list("imagenet_synset_to_lemma.txt"))


def are_wordnet_ids(names: Iterable[str]) -> bool:
    """Whether all class names are WordNet ids, as the folders of ImageNet are called."""
    return all(WORDNET_ID.fullmatch(name) for name in names)


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
