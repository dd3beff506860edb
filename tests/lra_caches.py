"""Small token caches for tests, written as tools/prepare_lra.py leaves them."""

from pathlib import Path

import numpy as np

from data.sources.token_cache import ARRAYS, CODECS, TASKS, FileRecord, Manifest, SplitRecord, array_name
from utils.files import file_digest


def write_cache(
    root: Path,
    task: str,
    *,
    samples: int = 96,
    longest: int = 24,
    classes: int = 3,
    splits: tuple[str, ...] = ("train", "val", "test"),
    held_out: int = 0,
    seed: int = 0,
) -> Path:
    """Documents of random length in which the label is the most frequent of the first symbols, so it can be learned."""
    codec, documents = TASKS[task]
    generator, records, lengths = np.random.default_rng(seed), {}, []
    root.mkdir(parents=True, exist_ok=True)
    for split in splits:
        labels = generator.integers(0, classes, samples).astype(np.uint8)
        texts = []
        for label in np.repeat(labels, documents):
            length = int(generator.integers(longest // 2, longest + 1))
            symbols = generator.integers(0, CODECS[codec], length)
            texts.append(np.where(generator.random(length) < 0.5, label, symbols).astype(np.uint8))
        lengths += [len(text) for text in texts]
        arrays = {
            "tokens": np.concatenate(texts),
            "offsets": np.cumsum([0, *map(len, texts)]),
            "labels": labels,
        }
        files = {}
        for array, values in arrays.items():
            path = root / array_name(split, array)
            np.save(path, values.astype(ARRAYS[array]))
            files[path.name] = FileRecord(path.stat().st_size, file_digest(path))
        records[split] = SplitRecord(samples, files)
    manifest = Manifest(
        task=task,
        title=f"{task} (for a test)",
        codec=codec,
        symbols=CODECS[codec],
        documents=documents,
        classes=tuple(str(i) for i in range(classes)),
        longest=max(lengths),
        seed=seed,
        held_out=held_out,
        source={"kind": "test"},
        splits=records,
        baselines={"val": {"majority class": 0.25}, "test": {"majority class": 0.5}} if task == "listops" else {},
    )
    (root / "manifest.json").write_text(manifest.dump())
    return root
