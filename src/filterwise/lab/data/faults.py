"""Entries of a data set that cannot be learned from: found before training, listed together."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

from filterwise.lab.errors import UsageError, reason

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

__all__ = ["Fault", "check_pictures", "settle"]

LISTED = 20
"""Faults that a refusal names one by one."""
READERS = 8


class Fault(NamedTuple):
    """Why an entry cannot be learned from.

    Attributes:
        file: Where it stands.
        entry: Which one in the file; empty for the whole file.
        kind: What is wrong in few words, the same for all of its kind.
        detail: With its values.
    """

    file: str
    entry: str
    kind: str
    detail: str = ""

    def __str__(self) -> str:
        """Return it as one line."""
        place = f"{self.file}, {self.entry}" if self.entry else self.file
        return f"{place}: {self.kind}" + (f" ({self.detail})" if self.detail else "")


def settle(faults: Sequence[Fault], skip: bool) -> dict[str, int]:
    """Refuse faults, or count those that are left out.

    Returns:
        How many of each kind were left out.

    Raises:
        UsageError: If there is one and it is not to be skipped; all are listed, up to a number.
    """
    counts = Counter(fault.kind for fault in faults)
    if faults and not skip:
        lines = [f"  {fault}" for fault in faults[:LISTED]]
        if len(faults) > LISTED:
            lines.append(f"  and {len(faults) - LISTED} more")
        kinds = ", ".join(f"{kind}: {count}" for kind, count in counts.most_common())
        raise UsageError(
            f"the data has {len(faults)} faulty entries ({kinds}). Mend them, or leave them out"
            " with data.skip_bad.\n" + "\n".join(lines)
        )
    return dict(counts)


def check_pictures(paths: Iterable[tuple[Path, tuple[int, int] | None]]) -> dict[str, Fault]:
    """Decode pictures, and return the faults of those that cannot be, by path.

    Args:
        paths: Each with the width and height that it should have, if anything says so.
    """
    with ThreadPoolExecutor(READERS) as pool:
        found = pool.map(lambda each: _picture_fault(*each), list(paths))
        return {fault.file: fault for fault in found if fault is not None}


def _picture_fault(path: Path, size: tuple[int, int] | None) -> Fault | None:
    from PIL import Image

    if not path.is_file():
        return Fault(str(path), "", "missing picture")
    try:
        with Image.open(path) as image:
            found = image.size
            # JPEG is then decoded at an eighth: enough to see a torn file, and quicker.
            image.draft("RGB", (max(found[0] // 8, 1), max(found[1] // 8, 1)))
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return Fault(str(path), "", "broken picture", reason(error))
    if size is not None and found != size:
        words = f"{found[0]}x{found[1]}, the annotations say {size[0]}x{size[1]}"
        return Fault(str(path), "", "picture of another size", words)
    return None
