"""Faults of deferral, for law 30; entered among the faults of `support.faults`."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

from filterwise.keeping.gathered import GatheringWeight
from filterwise.keeping.kept import KeptWeight
from support.faults import fault


@fault
def loses_the_sum():
    """Hands over the last micro-batch alone."""

    def take(self: Any) -> None:
        self.drop()

    with patch.object(GatheringWeight, "take", take):
        yield


@fault
def hands_over_again():
    """Leaves the gathered gradient where it was after handing it over."""
    with patch.object(GatheringWeight, "take", lambda self: _copied(self.gathered())):
        yield


def _copied(gathered: Any) -> Any:
    return None if gathered is None else gathered.clone()


@fault
def trusts_the_kept_weight():
    """Goes on with the kept weight after a step."""
    always = property(lambda _: True)
    with (
        patch.object(GatheringWeight, "is_open", always),
        patch.object(KeptWeight, "is_unchanged", lambda self: self.made is not None),
    ):
        yield


@fault
def outlives_zero_grad():
    """Keeps what was gathered when `zero_grad` drops every other gradient."""
    with patch.object(GatheringWeight, "gathered", lambda self: self._sum):
        yield
