"""A public name that no page documents is a warning, and so breaks the build."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

from sphinx.util.logging import getLogger

import filterwise

if TYPE_CHECKING:
    from collections.abc import Container, Iterator

    from sphinx.application import Sphinx
    from sphinx.environment import BuildEnvironment

logger = getLogger(__name__)


def public_names(module: ModuleType) -> Iterator[str]:
    """Yield the dotted name of everything public in a module and in its public modules."""
    for name in module.__all__:
        value = getattr(module, name)
        if isinstance(value, ModuleType):
            yield from public_names(value)
        else:
            yield f"{module.__name__}.{name}"


def undocumented(documented: Container[str]) -> list[str]:
    """Return the public names that are not among the documented ones."""
    return [name for name in public_names(filterwise) if name not in documented]


def _check(app: Sphinx, env: BuildEnvironment) -> None:
    del app
    for name in undocumented(env.domains.python_domain.objects):
        logger.warning("%s is public and no page documents it", name)


def setup(app: Sphinx) -> dict[str, Any]:
    """Look when all pages have been read."""
    app.connect("env-check-consistency", _check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
