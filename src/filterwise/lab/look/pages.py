"""From a template to a page: one HTML file that needs no network and no script."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from filterwise.lab.look.drawing import DARK, LIGHT, inline

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from filterwise.lab.look.drawing import Figure

__all__ = ["placed", "render"]


def render(template: Path, filters: Mapping[str, Callable[..., str]], **values: Any) -> str:
    """Return the HTML of a page.

    Args:
        template: Its template, which extends ``base.html`` of this folder.
        filters: Of the template, by name.
        values: What the template speaks of.
    """
    environment = Environment(
        loader=FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(filters)
    return environment.get_template(template.name).render(light=LIGHT, dark=DARK, **values)


def placed(figures: Iterable[Figure]) -> list[tuple[Figure, str]]:
    """Return figures with what stands for them in the page itself."""
    return [(figure, inline(figure)) for figure in figures]
