"""What is wrong with nested values, in one sentence: the place, the value, the nearest name."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from filterwise.lab.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = ["checked_values", "nearest"]

Model = TypeVar("Model", bound=BaseModel)
Place = tuple[str | int, ...]


def checked_values(kind: type[Model], values: Any, where: Callable[[Place], str]) -> Model:
    """Return the model that nested values mean.

    Args:
        kind: What they are.
        values: As a file or a command line has them.
        where: What a message begins with, from the place of the value that is wrong: a file and a
            line, say.

    Raises:
        UsageError: If a key is unknown (naming the nearest) or a value is out of range.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        # A misspelt key is missing under its right name, too: what it was meant to be helps more.
        first = min(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
        place, at = _place(kind, values, first["loc"])
        raise UsageError(f"{where(place)}: {_sentence(first, place, at)}") from None


def nearest(name: Any, known: Sequence[str], of: str = "Known") -> str:
    """Return a sentence that names what is nearest to a name, or all that is known."""
    found = get_close_matches(str(name), known, n=1)
    return f"Nearest: {found[0]}." if found else f"{of}: {', '.join(known)}."


def _sentence(first: Mapping[str, Any], place: Place, at: Any) -> str:
    name = ".".join(str(part) for part in place)
    if first["type"] == "extra_forbidden":
        keys = list(at.model_fields) if at is not None else []
        return f"there is no key {name}. {nearest(place[-1], keys, 'Keys here')}"
    if first["type"] == "missing":
        return f"{name} is missing."
    words = first["msg"].removeprefix("Value error, ")
    words = words[0].lower() + words[1:]
    given = "" if isinstance(first["input"], dict | BaseModel) else f"{first['input']!r}: "
    context = first.get("ctx", {})
    if first["type"] == "literal_error":
        words = f"it is none of {context['expected']}. {_nearest_word(given, context['expected'])}"
    elif first["type"] == "union_tag_invalid":
        words += f". {_nearest_word(context['tag'], context['expected_tags'])}"
    return f"{name + ': ' if name else ''}{given}{words.removesuffix('.')}."


def _nearest_word(given: str, known: str) -> str:
    """Return the sentence for one of pydantic's lists: quoted, with commas and an or."""
    words = known.replace(" or ", ", ").replace("'", "").split(", ")
    return nearest(given.strip("': "), words)


def _place(kind: Any, values: Any, loc: Sequence[str | int]) -> tuple[Place, Any]:
    """Return the place without the words pydantic puts into it, and the model that it lies in.

    It names the chosen kind of a union as if it were a key.
    """
    place: list[str | int] = []
    annotation, owner = kind, None
    for part in loc:
        chosen = _model(annotation, part)
        if chosen is not None and not (isinstance(values, dict) and part in values):
            annotation = chosen
            continue
        place.append(part)
        owner = annotation if _is_model(annotation) else None
        annotation = _inside(annotation, part)
        values = _item(values, part)
    return tuple(place), owner


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _model(annotation: Any, tag: str | int) -> Any:
    """Return the model of a union that pydantic's tag means."""
    for each in get_args(annotation):
        if _is_model(each):
            field = each.model_fields.get("kind")
            if tag in (each.__name__, field.default if field else None):
                return each
        elif found := _model(each, tag):
            return found
    return None


def _inside(annotation: Any, part: str | int) -> Any:
    """Return the annotation of what lies under a key or at a number."""
    if _is_model(annotation):
        field = annotation.model_fields.get(str(part))
        return field.annotation if field else None
    inner = get_args(annotation)
    if get_origin(annotation) is dict:
        return inner[1]
    if get_origin(annotation) in (list, tuple):
        return inner[0]
    # Of an optional or annotated value, what it is when it is there.
    models = [each for each in inner if each is not type(None)]
    return _inside(models[0], part) if models else None


def _item(values: Any, part: str | int) -> Any:
    try:
        return values[part]
    except (KeyError, IndexError, TypeError):
        return None
