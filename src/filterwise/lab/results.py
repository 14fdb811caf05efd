"""``results.jsonl``: one finished run a line, whole at every moment.

The file is rewritten beside itself and renamed while a lock is held, so that a kill, a full disk or
two commands on one folder leave either the old file or the new one. What cannot be read in it, and
runs of other settings, stay in it byte for byte.
"""

from __future__ import annotations

import json
import os
import tempfile
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from filterwise.lab.errors import LabError, reason
from filterwise.lab.settings import RunSettings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from filterwise.lab.engine import Outcome

__all__ = ["FORMAT", "Contents", "Lines", "Record", "Results", "write_whole"]

AnyRecord = TypeVar("AnyRecord", bound=BaseModel)

FORMAT = 1
"""Number of this layout of a line; a line with another is kept and not read."""


class CurvePoint(BaseModel):
    """One finished epoch of a run: its number, mean training loss and test error."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    epoch: int
    train_loss: float
    test_error: float


class OutcomeFields(BaseModel):
    """What `filterwise.lab.engine.Outcome` holds, as it is read back."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    error: float | None
    wrong: str
    diverged_at: tuple[int, int] | None
    failed: str | None
    curve: list[CurvePoint]
    steps: int
    conversion: str


class Record(BaseModel):
    """One finished run: a line of the file.

    Attributes:
        format: `FORMAT`.
        id: Hash of the settings.
        settings: Everything that decides the outcome.
        outcome: The fields of `filterwise.lab.engine.Outcome`.
        times: ``started`` (UTC), ``seconds`` (building, training and testing, beside other runs).
        versions: Of python, filterwise and what it stands on.
        hardware: Processor, cores, threads, device.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int
    id: str
    settings: RunSettings
    outcome: OutcomeFields
    times: dict[str, Any]
    versions: dict[str, str]
    hardware: dict[str, Any]

    @model_validator(mode="after")
    def _same_identity(self) -> Record:
        if self.format != FORMAT:
            raise ValueError(f"its format is {self.format}, this program reads {FORMAT}")
        if self.id != self.settings.identity:
            raise ValueError(f"its id {self.id} is not that of its settings")
        return self


@dataclass(frozen=True)
class Contents(Generic[AnyRecord]):
    """What a results file holds.

    Attributes:
        records: Readable records by key; of two with one key the later.
        complaints: A sentence for each line that cannot be read.
    """

    records: dict[str, AnyRecord]
    complaints: tuple[str, ...]


class Lines(Generic[AnyRecord]):
    """The results in one folder; safe to use from several processes and commands."""

    kind: type[AnyRecord]
    """What a line is."""
    option = "--out"
    """What the command line calls the folder."""

    def __init__(self, folder: Path) -> None:
        """Name the folder; nothing is touched before `prepare`."""
        self.folder = folder
        self.path = folder / "results.jsonl"
        self._locks = folder / ".locks"

    @staticmethod
    def key(record: AnyRecord) -> str:
        """Return what a record is known by; of two with one key the later counts."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Make the folder and see that it can be written to.

        Raises:
            LabError: If it cannot.
        """
        try:
            self._locks.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder) as probe:
                probe.write(b"filterwise")
        except OSError as error:
            raise LabError(
                f"{self.option}: {self.folder} cannot be written to: {reason(error)}."
            ) from None

    def read(self) -> Contents[AnyRecord]:
        """Return the records, and what in the file cannot be read.

        Raises:
            LabError: If the file is there but cannot be opened.
        """
        records: dict[str, AnyRecord] = {}
        complaints = []
        for number, line in enumerate(self._lines(), start=1):
            if not line.strip():
                continue
            try:
                record = self.kind.model_validate_json(line)
            except ValidationError as error:
                complaints.append(
                    f"{self.path} line {number} is not a run of this program"
                    f" ({_first(error)}); it stays as it is and is not counted."
                )
            else:
                records[self.key(record)] = record
        return Contents(records, tuple(complaints))

    def add(self, record: AnyRecord) -> None:
        """Add the record of a finished run.

        Raises:
            LabError: If the disk refuses; the file is as it was.
        """
        line = json.dumps(record.model_dump(mode="json"), separators=(",", ":"), allow_nan=False)
        with FileLock(self._locks / "results.lock"):
            write_whole(self.path, b"".join(self._lines()) + line.encode() + b"\n")

    @contextmanager
    def claim(self, identity: str) -> Iterator[bool]:
        """Hold the right to train a run, so that two commands on one folder share the work.

        Yields:
            Whether it is held; False while another process holds it.
        """
        lock = FileLock(self._locks / f"{identity}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            # Unlinked while held: who opened this very file before can then hold it beside others,
            # but reads the results first and finds the run there.
            with suppress(OSError):
                os.unlink(lock.lock_file)
            lock.release()

    def _lines(self) -> list[bytes]:
        """Return the lines with their ends; a torn last line gets one, so the next starts fresh."""
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise LabError(f"{self.path} cannot be read: {reason(error)}.") from None
        # Not splitlines: it would also divide a damaged line at stray carriage returns.
        return [line + b"\n" for line in content.removesuffix(b"\n").split(b"\n") if content]


class Results(Lines[Record]):
    """The runs of a comparison, by identity."""

    kind = Record

    @staticmethod
    def key(record: Record) -> str:
        """Return the run's identity."""
        return record.id


def record_of(
    settings: RunSettings,
    outcome: Outcome,
    times: dict[str, Any],
    versions: dict[str, str],
    hardware: dict[str, Any],
) -> Record:
    """Make the line of a run from what it was and what it came to."""
    return Record(
        format=FORMAT,
        id=settings.identity,
        settings=settings,
        outcome=OutcomeFields.model_validate(asdict(outcome)),
        times=times,
        versions=versions,
        hardware=hardware,
    )


def write_whole(path: Path, content: bytes) -> None:
    """Write a file beside its place and rename it there: never half a file under its name.

    Raises:
        LabError: If the disk refuses; what was there before is as it was.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            with beside.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        finally:
            with suppress(OSError):
                beside.unlink(missing_ok=True)
    except OSError as error:
        raise LabError(
            f"{path} cannot be written: {reason(error)}. What was finished before is kept; make"
            " room and give the same command again."
        ) from None


def _first(error: ValidationError) -> str:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    words = first["msg"].removeprefix("Value error, ")
    return f"{place}: {words}" if place else words
