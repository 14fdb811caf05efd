"""Errors of the lab: each is one line for the person at the command line, and an exit code."""

from __future__ import annotations

__all__ = ["LabError", "UsageError", "reason"]


class LabError(Exception):
    """Something failed while running; what finished is kept."""

    exit_code = 1


class UsageError(LabError):
    """The command was not given what it needs; nothing was started."""

    exit_code = 2


def reason(error: BaseException) -> str:
    """Return an error's own words in one line, without the number that systems put before them."""
    words = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(words.split()) or type(error).__name__
