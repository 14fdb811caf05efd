"""What was found, one line a pair, added to a file that is whole at every moment."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

import filterwise as fw
from filterwise.lab.errors import LabError, UsageError, reason
from filterwise.lab.hardware import versions

if TYPE_CHECKING:
    from collections.abc import Iterator

    from filterwise.lab.compatibility.architectures import Architecture

__all__ = ["Records", "source_digest"]

LIBRARIES = ("torch", "torchvision", "timm")
DONE = ("passed", "refused", "diverges", "unfit")


def source_digest() -> str:
    """Return eight hexadecimal digits that name the library's code, the lab's left out."""
    home = Path(fw.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(home.rglob("*.py")):
        if "lab" not in path.relative_to(home).parts:
            digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


class Records:
    """Two files in a folder: ``sizes.jsonl`` and ``pairs.jsonl``; of equal lines the last counts.

    Lines of other versions of torch, torchvision or timm stay in the files and are not read.
    """

    def __init__(self, folder: Path) -> None:
        """Open a folder, making it where it is missing.

        Raises:
            LabError: If the disk refuses.
        """
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LabError(f"{folder} cannot be written to: {reason(error)}.") from None
        found = versions()
        self.about = {name: found[name] for name in LIBRARIES if name in found}

    @contextmanager
    def claim(self) -> Iterator[None]:
        """Keep other commands off the folder.

        Raises:
            UsageError: If one is at work in it.
        """
        try:
            with FileLock(self.folder / ".lock", timeout=0):
                yield
        except Timeout:
            raise UsageError(f"another command is at work in {self.folder}.") from None

    def sizes(self) -> dict[str, dict[str, Any]]:
        """Return what is known of each architecture's size, by library and name."""
        return {line["architecture"]: line for line in self._read("sizes.jsonl")}

    def pairs(self) -> dict[tuple[str, str], dict[str, Any]]:
        """Return what was found, by architecture and recipe."""
        return {(line["architecture"], line["recipe"]): line for line in self._read("pairs.jsonl")}

    def finished(self) -> set[tuple[str, str]]:
        """Return the pairs that need not be examined again: all but those that failed."""
        return {key for key, line in self.pairs().items() if line["outcome"] in DONE}

    def add_size(self, one: Architecture, found: dict[str, Any]) -> None:
        """Add an architecture's size."""
        self._add("sizes.jsonl", {"architecture": str(one), **found})

    def add_pair(self, one: Architecture, recipe: str, found: dict[str, Any], code: str) -> None:
        """Add what was found.

        Args:
            one: The architecture.
            recipe: The recipe.
            found: What `filterwise.lab.compatibility.examine.examine` returns.
            code: `source_digest` of the code that was examined.
        """
        self._add(
            "pairs.jsonl", {"architecture": str(one), "recipe": recipe, **found, "code": code}
        )

    def _read(self, name: str) -> Iterator[dict[str, Any]]:
        try:
            text = (self.folder / name).read_text(encoding="utf-8")
        except FileNotFoundError:
            return
        for line in text.splitlines():
            try:
                found = json.loads(line)
            except ValueError:  # the end of a line that a kill cut off
                continue
            if found.get("versions") == self.about:
                yield found

    def _add(self, name: str, found: dict[str, Any]) -> None:
        line = json.dumps({**found, "versions": self.about}).encode() + b"\n"
        try:
            with (self.folder / name).open("ab+") as file:
                if file.tell():
                    file.seek(-1, os.SEEK_END)
                    if file.read(1) != b"\n":
                        line = b"\n" + line
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise LabError(f"{self.folder / name} cannot be written: {reason(error)}.") from None
