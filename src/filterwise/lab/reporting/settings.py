"""Settings of runs as flat names, to say where they differ."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from filterwise.lab.training.settings import TrainingSettings

__all__ = ["plain", "unequal"]


def plain(settings: TrainingSettings) -> dict[str, Any]:
    """Return all settings but the seed and how the run was carried out, by dotted name."""
    return _flat(settings.model_dump(mode="json", exclude={"execution", "seed"}))


def unequal(several: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names whose values are not the same in all settings."""
    names = dict.fromkeys(name for each in several for name in each)
    return [
        name for name in names if any(each.get(name) != several[0].get(name) for each in several)
    ]


def _flat(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{before}{name}.")
        else:
            found[f"{before}{name}"] = value
    return found
