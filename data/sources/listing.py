"""Which files of a folder are images to be used: the one rule for every reader and tool."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS

from data.sources.base import DataError
from logger import printable

# What systems leave in folders and archives; names that start with a dot are left out too.
LITTER = frozenset(
    ["__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found", "Thumbs.db"]
)


def is_litter(path: str) -> bool:
    """Whether a file is left out because of its name or that of a folder in its (relative) path."""
    return any((part.startswith(".") and part not in (".", "..")) or part in LITTER for part in path.split("/"))


def is_folder_name(name: str) -> bool:
    """Whether a name is that of a folder in another one, which readers look into."""
    return bool(name) and "/" not in name and not is_litter(name) and name not in (".", "..")


def is_image(path: str) -> bool:
    """Whether a name has the extension of an image."""
    return path.lower().endswith(IMG_EXTENSIONS)


class Listing:
    """What lies in the folders of `root`, links followed, each real folder once.

    `classes`: its folders are classes, none of which may reach into another. `left_out` are hidden and system files
    and folders, `other` files without an image's extension, `repeated` folders that a link leads to once more;
    `folders` are the names of root's own folders, `loose` its own images.
    """

    def __init__(self, root: Path, *, classes: bool = True) -> None:
        self.root, self._classes = str(root), classes
        self.left_out, self.other, self.repeated = list[str](), list[str](), list[str]()
        self.folders, self.loose = list[str](), list[str]()
        self._real_root = os.path.realpath(root)
        self._reached = {self._real_root: ("", self.root)}  # real folders: of which class, and by which path
        self._real = {self.root: self._real_root}  # where the folders that were looked into really are
        for entry in sorted(os.scandir(root), key=lambda entry: entry.name):
            if is_litter(entry.name):
                self.left_out.append(entry.path)
            elif os.path.isdir(entry.path):  # which no link that leads nowhere is
                self.folders.append(entry.name)
            elif is_image(entry.name):
                self.loose.append(entry.path)
            else:
                self.other.append(entry.path)

    def images(self, folder: str) -> Iterator[str]:
        """The paths of the images below one of `folders`, in the order of folders and names.

        Raises DataError for a link that leads to a folder around it or into another of `folders`, and for a folder
        that cannot be read.
        """
        top, walked = os.path.join(self.root, folder), list[tuple[str, list[str]]]()
        owner = folder if self._classes else ""
        if not self._enter(top, owner):
            return
        for parent, folders, files in os.walk(top, followlinks=True, onerror=_refuse):
            folders[:] = [name for name in sorted(folders) if self._enter(os.path.join(parent, name), owner)]
            walked.append((parent, files))
        for parent, files in sorted(walked):
            for name in sorted(files):
                path = os.path.join(parent, name)
                if is_litter(name):
                    self.left_out.append(path)
                elif is_image(name):
                    yield path
                else:
                    self.other.append(path)

    def _enter(self, path: str, owner: str) -> bool:
        """Whether to look into the folder at `path`, which belongs to the class `owner`."""
        if is_litter(os.path.basename(path)):
            self.left_out.append(path)
            return False
        parent, name = os.path.split(path)  # asking the disk about every part of a path is slow in deep folders
        real = os.path.realpath(path) if os.path.islink(path) else os.path.join(self._real[parent], name)
        self._real[path] = real
        other, first = self._reached.setdefault(real, (owner, path))
        around = first == path and _contains(real, self._real_root)  # all of root lies in it
        if first == path and not around:
            return True
        if around or other != owner or _contains(first, path):
            raise DataError(
                f"{printable(path)} leads to {printable(real if around else first)}, which is a folder around it or"
                " belongs to another class; remove the link"
            )
        self.repeated.append(path)
        return False

    def remark(self) -> str:
        """What is not used, in one line with counts; empty where everything is."""
        endings = Counter(os.path.splitext(path)[1].lower() or "no extension" for path in self.other)
        kinds = ", ".join(f"{printable(ending)} {count:,}" for ending, count in endings.most_common(5))
        parts = (
            (self.left_out, "hidden or system files and folders"),
            (self.other, f"files without an image's extension ({kinds})"),
            (self.loose, "images outside the class folders"),
            (self.repeated, "links to folders that are listed already"),
        )
        told = [f"{len(paths):,} {what}, such as {printable(paths[0])}" for paths, what in parts if paths]
        return f"{printable(self.root)}: not used: {'; '.join(told)}" if told else ""


def _contains(folder: str, path: str) -> bool:
    return os.path.join(path, "").startswith(os.path.join(folder, ""))


def _refuse(error: OSError) -> None:
    raise DataError(f"{printable(error.filename)} cannot be read: {error.strerror}") from error
