"""YAML files as plain values that know their lines: safe, without anchors, without a key twice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from filterwise.lab.errors import LabError, UsageError, reason

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Document", "Place", "read_document"]

Place = tuple[str | int, ...]
"""Keys and numbers on the way to a value."""


@dataclass(frozen=True)
class Document:
    """One file.

    Attributes:
        path: Where it lies.
        content: Its bytes.
        values: What it says.
        lines: The line, from 1, of each key and each item of a list.
    """

    path: Path
    content: bytes
    values: dict[str, Any]
    lines: dict[Place, int]

    def where(self, place: Place = ()) -> str:
        """Return file and line of a value, or of the nearest around it."""
        while place and place not in self.lines:
            place = place[:-1]
        return f"{self.path} line {self.lines.get(place, 1)}"

    def has(self, place: Place) -> bool:
        """Tell whether the file says something at a place."""
        return place in self.lines


def read_document(path: Path) -> Document:
    """Read a file whose top is a mapping.

    Raises:
        UsageError: If it is not YAML, or not of the plain kind, with file and line.
        LabError: If it cannot be opened.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise LabError(f"{path} cannot be read: {reason(error)}.") from None
    lines: dict[Place, int] = {}
    try:
        loader = _Loader(content)
        node = loader.get_single_node()
        values = loader.plain(node, (), lines) if node is not None else None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        words = " ".join(part for part in (error.context, error.problem) if part)
        raise UsageError(f"{path} line {line}: {words}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: it is not YAML: {reason(error)}.") from None
    if not isinstance(values, dict):
        raise UsageError(f"{path} line 1: a recipe is a mapping of keys to values.")
    return Document(path, content, values, lines)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, whose nodes are kept until their lines are taken."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise _error(
                self.peek_event(), "an alias (*name) is not allowed: a recipe has no anchors"
            )
        return super().compose_node(parent, index)

    def plain(self, node: yaml.Node, place: Place, lines: dict[Place, int]) -> Any:
        if isinstance(node, yaml.SequenceNode):
            found = []
            for number, each in enumerate(node.value):
                lines[*place, number] = each.start_mark.line + 1
                found.append(self.plain(each, (*place, number), lines))
            return found
        if not isinstance(node, yaml.MappingNode):
            return self.construct_object(node)
        values: dict[str, Any] = {}
        for key_node, each in node.value:
            key = self.construct_object(key_node)
            if not isinstance(key, str):
                raise _error(key_node, f"the key {key!r} must be text: write it in quotes")
            if key == "<<" or key in values:
                why = "merges are not allowed" if key == "<<" else "it is there already"
                raise _error(key_node, f"the key {key!r}: {why}")
            lines[*place, key] = key_node.start_mark.line + 1
            values[key] = self.plain(each, (*place, key), lines)
        return values


def _error(node: Any, words: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=words, problem_mark=node.start_mark)
