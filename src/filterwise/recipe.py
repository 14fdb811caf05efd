"""The grammar of recipes: one activation norm and one weight method, in words.

::

    recipe   = term { "+" term }          at most one norm and one method, in any order
    term     = name [ "(" argument { "," argument } ")" ]
    argument = value | name "=" value     value: number, true, false, a name, or NUMBER*2/n

Case and spaces do not matter. Options are the fields of the method's class, always by name; the one
positional argument is the number of groups of ``gn(16)``.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, NamedTuple

from filterwise.errors import RecipeError
from filterwise.methods.method import Method
from filterwise.methods.registry import METHODS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["NORMS", "Recipe", "as_recipe", "split_recipes"]

NORMS = {
    "bn": "batch normalization",
    "gn": "group normalization",
    "ln": "layer normalization",
    "in": "instance normalization",
    "none": "no activation norm",
    "keep": "the model's own norms",
}
"""The words for activation norms, and what they mean."""

GROUPS = re.compile(r"gn\(([1-9][0-9]*)\)")
NAME = re.compile(r"[a-z_][a-z0-9_]*")
NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?")
RELATIVE = re.compile(r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?\*2/n")
WORD = re.compile(r"[a-z_][a-z0-9_.+-]*")
LIST_ALL = "filterwise.methods() lists all methods."


@dataclass(frozen=True)
class Recipe:
    """A norm and a method: what a recipe's text means.

    Attributes:
        norm: What becomes of the activation norms that are there: ``bn``, ``gn``, ``gn(16)``,
            ``ln``, ``in``, ``none`` (removed) or ``keep``.
        method: How the weights are normalized; None leaves them as they are.

    Raises:
        RecipeError: If the norm is not one of these words, or the method is not a method.

    Example:
        >>> str(Recipe.parse("WS(like=timm) + GN"))
        'gn+ws(eps=1e-06, eps_inside=true)'
    """

    norm: str = "none"
    method: Method | None = None

    def __post_init__(self) -> None:
        """Check both halves."""
        if not isinstance(self.norm, str) or not (
            self.norm in NORMS or GROUPS.fullmatch(self.norm)
        ):
            words = ", ".join(NORMS)
            raise RecipeError(f"norm must be one of {words} or gn(GROUPS), got {self.norm!r}")
        if self.method is not None and not isinstance(self.method, Method):
            raise RecipeError(f"method must be {_METHOD_FORMS} or None, got {_shown(self.method)}")

    @classmethod
    def parse(cls, text: str) -> Recipe:
        """Read a recipe's text.

        Raises:
            RecipeError: If it cannot be read; the message has the position, a caret under the
                place, and the nearest valid name.
        """
        if not isinstance(text, str):
            raise RecipeError(f"a recipe's text must be a string, got {_shown(text)}")
        return _Reader(text).recipe()

    def __str__(self) -> str:
        """Return the canonical text, which parses back to an equal recipe.

        The one exception is ``ews``, whose labels cannot be written in a recipe.
        """
        if self.method is None:
            return self.norm
        return str(self.method) if self.norm == "none" else f"{self.norm}+{self.method}"


_METHOD_FORMS = "a method such as filterwise.WeightStandardization()"


def as_recipe(recipe: str | Recipe | Method) -> Recipe:
    """Return the recipe that a text, a recipe or a method means.

    A method means what its text alone means: activation norms are removed.

    Raises:
        RecipeError: If a text cannot be read, or it is neither of the three.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, Method):
        return Recipe("none", recipe)
    if isinstance(recipe, str):
        return Recipe.parse(recipe)
    forms = f'text such as "gn+ws", a Recipe, or {_METHOD_FORMS}'
    raise RecipeError(f"a recipe is {forms}, got {_shown(recipe)}")


def split_recipes(text: str) -> list[str]:
    """Split a list of recipes at the commas that stand outside parentheses.

    The parts are not parsed.

    Raises:
        RecipeError: If nothing stands before, between or after the commas.

    Example:
        >>> split_recipes("bn, gn+ws(eps=1e-5, ddof=1)")
        ['bn', 'gn+ws(eps=1e-5, ddof=1)']
    """
    parts = []
    for start, end in _split(text, ","):
        part = text[start:end].strip()
        if not part:
            raise _error(text, start, end, "a recipe is missing", "Write one, or drop the comma.")
        parts.append(part)
    return parts


def _shown(value: object) -> str:
    if isinstance(value, type):
        return f"the class {value.__name__} (call it: {value.__name__}())"
    return f"a {type(value).__name__}"


def _split(text: str, separator: str, start: int = 0) -> list[tuple[int, int]]:
    """Return start and end of the pieces between separators that stand outside parentheses."""
    pieces, depth = [], 0
    for place in range(start, len(text)):
        letter = text[place]
        if letter == "(":
            depth += 1
        elif letter == ")":
            depth = max(depth - 1, 0)
        elif letter == separator and depth == 0:
            pieces.append((start, place))
            start = place + 1
    return [*pieces, (start, len(text))]


def _error(text: str, start: int, end: int, problem: str, remedy: str) -> RecipeError:
    """Return an error with the position, what stands there, and a caret line."""
    fragment = text[start:end]
    start += len(fragment) - len(fragment.lstrip())
    fragment = fragment.strip()
    shown = re.sub(r"\s", " ", text)
    what = f": {fragment!r}" if fragment else ""
    caret = " " * start + "^" * max(len(fragment), 1)
    return RecipeError(
        f'{problem} in "{shown}", position {start + 1}{what}. {remedy}'.rstrip()
        + f"\n    {shown}\n    {caret}"
    )


def _nearest(word: str, names: Mapping[str, str]) -> str:
    """Return the sentence with the names nearest to a word; their descriptions count as names."""
    candidates = {name: name for name in names}
    for name, description in names.items():
        if squeezed := re.sub(r"[^a-z]", "", description.lower()):
            candidates.setdefault(squeezed, name)
    squeezed = re.sub(r"[_\s-]", "", word)
    close = get_close_matches(word, candidates, n=2, cutoff=0.55)
    close += get_close_matches(squeezed, candidates, n=2, cutoff=0.55)
    found = list(dict.fromkeys(candidates[match] for match in close))[:2]
    if not found:
        return ""
    described = [f"'{name}' ({names[name]})" if names[name] else f"'{name}'" for name in found]
    return f"Nearest: {', '.join(described)}."


class _Argument(NamedTuple):
    """One argument: its name (None if positional) and its value, and where they stand."""

    name: str | None
    value: str
    start: int
    value_start: int
    end: int


class _Reader:
    """Reads one recipe; keeps the text as it was given for the messages."""

    def __init__(self, text: str) -> None:
        self.text = text
        # Only ASCII is lowered: other letters can change their number, and positions with it.
        self.lower = "".join(letter.lower() if letter.isascii() else letter for letter in text)

    def fail(self, start: int, end: int, problem: str, *remedies: str) -> RecipeError:
        return _error(self.text, start, end, problem, " ".join(filter(None, remedies)))

    def recipe(self) -> Recipe:
        if not self.text.strip():
            raise RecipeError(f'the recipe is empty. Write for example "gn+ws". {LIST_ALL}')
        self.check_parentheses()
        norm: str | None = None
        method: Method | None = None
        for start, end in _split(self.lower, "+"):
            name, arguments, name_start, name_end = self.term(start, end)
            place = (name_start, name_end)
            if name in NORMS:
                if norm is not None:
                    raise self.fail(*place, f"a second norm beside {norm}", "Give one.")
                norm = self.norm(name, arguments)
            elif name in METHODS:
                if method is not None:
                    raise self.fail(*place, f"a second method beside {method.name}", "Give one.")
                method = self.method(name, arguments, place)
            else:
                titles = {word: kind.title for word, kind in METHODS.items()} | NORMS
                remedy = _nearest(name, titles) or f"Norms: {', '.join(NORMS)}."
                raise self.fail(*place, "unknown norm or method", remedy, LIST_ALL)
        return Recipe("none" if norm is None else norm, method)

    def check_parentheses(self) -> None:
        opened: int | None = None
        for place, letter in enumerate(self.lower):
            if letter == "(":
                if opened is not None:
                    raise self.fail(place, place + 1, "a parenthesis inside another", "Drop it.")
                opened = place
            elif letter == ")":
                if opened is None:
                    raise self.fail(place, place + 1, "a parenthesis not opened", "Drop it.")
                opened = None
        if opened is not None:
            raise self.fail(opened, opened + 1, "a parenthesis not closed", "Add ')'.")

    def term(self, start: int, end: int) -> tuple[str, list[_Argument], int, int]:
        """Read a name and its arguments; return also where the name stands."""
        start, end = self.trim(start, end)
        match = NAME.match(self.lower, start, end)
        if match is None:
            problem = "a name is missing" if start == end else "expected a name"
            raise self.fail(start, end, problem, "A recipe is a norm, a method, or norm+method.")
        rest, _ = self.trim(match.end(), end)
        arguments: list[_Argument] = []
        if rest < end and self.lower[rest] == "(":
            close = self.lower.index(")", rest)
            pieces = _split(self.lower[:close], ",", rest + 1)
            arguments = [self.argument(*piece) for piece in pieces]
            rest, _ = self.trim(close + 1, end)
        if rest < end:
            raise self.fail(rest, end, "expected '+' or the end", "Join norm and method with '+'.")
        return match[0], arguments, match.start(), match.end()

    def trim(self, start: int, end: int) -> tuple[int, int]:
        """Return the stretch without the spaces around it."""
        while start < end and self.lower[start].isspace():
            start += 1
        while end > start and self.lower[end - 1].isspace():
            end -= 1
        return start, end

    def argument(self, start: int, end: int) -> _Argument:
        left, right = self.trim(start, end)
        if left == right:
            raise self.fail(
                start, end, "an argument is missing", "Write one, or drop what is empty."
            )
        equals = self.lower.find("=", left, right)
        if equals < 0:
            return _Argument(None, self.lower[left:right], left, left, right)
        name = self.lower[left:equals].strip()
        value_start, _ = self.trim(equals + 1, right)
        if not NAME.fullmatch(name):
            raise self.fail(left, right, "expected the name of an option before '='", "Write it.")
        if value_start == right:
            raise self.fail(left, right, f"a value is missing after {name}=", "Write one.")
        return _Argument(name, self.lower[value_start:right], left, value_start, right)

    def norm(self, name: str, arguments: Sequence[_Argument]) -> str:
        if not arguments:
            return name
        first = arguments[0]
        if name != "gn":
            raise self.fail(first.start, first.end, f"{name} takes no argument", f"Write {name}.")
        if len(arguments) > 1:
            second = arguments[1]
            raise self.fail(second.start, second.end, "gn takes one number", "Write gn(16).")
        if first.name not in (None, "groups"):
            raise self.fail(first.start, first.end, "gn has no such option", "Write gn(16).")
        if not re.fullmatch(r"0*[1-9][0-9]*", first.value):
            where = (first.value_start, first.end)
            raise self.fail(*where, "groups are a whole number of at least 1", "Write gn(16).")
        return f"gn({int(first.value)})"

    def method(self, name: str, arguments: Sequence[_Argument], place: tuple[int, int]) -> Method:
        kind = METHODS[name]
        if name == "ews":
            self.refuse_labels(kind, arguments, place)
        places: dict[str, _Argument] = {}
        given: dict[str, Any] = {}
        for argument in arguments:
            option = self.option(kind, argument)
            if option in places:
                raise self.fail(
                    argument.start, argument.end, f"{option} is given twice", "Keep one."
                )
            places[option] = argument
            given[option] = self.value(argument)
        preset = self.preset(kind, places["like"]) if "like" in given else {}
        given.pop("like", None)
        try:
            return kind(**{**preset, **given})
        except ValueError as error:
            raise self.bad_value(str(error), places, place) from None

    def refuse_labels(
        self, kind: type[Method], arguments: Sequence[_Argument], place: tuple[int, int]
    ) -> None:
        """Refuse a method whose labels are a tensor, which no text can hold."""
        start, end = place
        for argument in arguments:
            if argument.name == "label":
                start, end = argument.start, argument.end
        raise self.fail(
            start,
            end,
            "the labels of ews are a tensor and cannot be written",
            f"Use the class: filterwise.{kind.__name__}(label=...), alone or in"
            ' filterwise.Recipe("gn", ...).',
        )

    def option(self, kind: type[Method], argument: _Argument) -> str:
        """Return the name of a valid option."""
        names = {field.name: "" for field in dataclasses.fields(kind)}
        if kind.presets:
            names["like"] = "a preset: " + ", ".join(kind.presets)
        have = ", ".join(names) if names else "none"
        if argument.name is None:
            remedy = f"Write NAME=VALUE; the options of {kind.name}: {have}."
            problem = f"an option of {kind.name} without its name"
            raise self.fail(argument.start, argument.end, problem, remedy)
        if argument.name not in names:
            where = (argument.start, argument.start + len(argument.name))
            remedy = f"Options of {kind.name}: {have}."
            close = _nearest(argument.name, names)
            raise self.fail(*where, f"unknown option of {kind.name}", close, remedy)
        return argument.name

    def preset(self, kind: type[Method], argument: _Argument) -> Mapping[str, Any]:
        if argument.value not in kind.presets:
            close = _nearest(argument.value, dict.fromkeys(kind.presets, ""))
            remedy = f"Presets of {kind.name}: {', '.join(kind.presets)}."
            where = (argument.value_start, argument.end)
            raise self.fail(*where, f"unknown preset of {kind.name}", close, remedy)
        return kind.presets[argument.value]

    def value(self, argument: _Argument) -> bool | int | float | str:
        """Return a boolean, a number, or the text of a name or of NUMBER*2/n."""
        text = argument.value
        if text in ("true", "false"):
            return text == "true"
        squeezed = "".join(text.split())
        if RELATIVE.fullmatch(squeezed):
            return squeezed
        if NUMBER.fullmatch(text):
            return int(text) if re.fullmatch(r"[+-]?[0-9]+", text) else float(text)
        if WORD.fullmatch(text):
            return text
        where = (argument.value_start, argument.end)
        raise self.fail(
            *where, "unreadable value", "Take a number, true, false, a name, NUMBER*2/n."
        )

    def bad_value(
        self, message: str, places: Mapping[str, _Argument], place: tuple[int, int]
    ) -> RecipeError:
        """Turn a method's refusal, whose text names the field, into an error with the position."""
        named = NAME.match(message)
        argument = places.get(named[0]) if named else None
        if argument is None:
            return self.fail(*place, message, "Change the options.")
        words = re.search(r"\bone of (.*), got ", message)
        names = dict.fromkeys(words[1].split(", "), "") if words else {}
        close = _nearest(argument.value, names)
        return self.fail(argument.value_start, argument.end, message, close)
