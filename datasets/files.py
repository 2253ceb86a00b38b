"""Where a data set's files lie: in a folder or in a zip. Both list names with sizes and read one name's bytes."""

import os
import zipfile
from pathlib import Path


def _visible(name: str) -> bool:
    return not any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


class Folder:
    """Files below `root`, by their path relative to it with forward slashes; hidden ones are left out."""

    def __init__(self, root: Path):
        self.root = root
        self.sizes: dict[str, int] = {}
        for folder, _, names in os.walk(root, followlinks=True):
            for name in names:
                path = os.path.join(folder, name)
                relative = os.path.relpath(path, root).replace(os.sep, "/")
                if _visible(relative):
                    self.sizes[relative] = os.stat(path).st_size if os.path.exists(path) else 0  # 0: a dangling link

    def read(self, name: str) -> bytes:
        return (self.root / name).read_bytes()


class Zip:
    """Members of a zip file. Every process opens its own handle, so that loader workers do not share a file position.

    Raises: zipfile.BadZipFile if the file is no zip, or a truncated one.
    """

    def __init__(self, root: Path):
        self.root = root
        self._handle: tuple[int, zipfile.ZipFile] | None = None
        members = [info for info in self._zip().infolist() if not info.is_dir()]
        self.sizes = {info.filename: info.file_size for info in members if _visible(info.filename)}

    def _zip(self) -> zipfile.ZipFile:
        if self._handle is None or self._handle[0] != os.getpid():
            self._handle = (os.getpid(), zipfile.ZipFile(self.root))
        return self._handle[1]

    def read(self, name: str) -> bytes:
        return self._zip().read(name)

    def __getstate__(self):
        return {**self.__dict__, "_handle": None}


Files = Folder | Zip


def shallowest(files: Files, filename: str) -> list[str]:
    """The members called `filename` in the fewest folders, in order: none, one, or one in each of several folders."""
    found = sorted(name for name in files.sizes if name.rsplit("/", 1)[-1] == filename)
    depth = min((name.count("/") for name in found), default=0)
    return [name for name in found if name.count("/") == depth]
