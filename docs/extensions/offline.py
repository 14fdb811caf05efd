"""A page that would fetch anything from the network is a warning, and so breaks the build."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sphinx.util.logging import getLogger

if TYPE_CHECKING:
    from sphinx.application import Sphinx

logger = getLogger(__name__)

REMOTE = re.compile(r"(?:https?:)?//")
IN_STYLE = re.compile(r"""(?:url\(|@import)\s*["']?((?:https?:)?//[^"')\s]+)""")


class _Resources(HTMLParser):
    """Collects what a page loads by itself; links that a person clicks are none of it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        addresses = [values.get(name, "") for name in ("src", "srcset", "data", "poster")]
        if tag == "link" and "canonical" not in values.get("rel", ""):
            addresses.append(values.get("href", ""))
        self.found += [one for one in addresses if REMOTE.match(one.strip())]
        self.found += IN_STYLE.findall(values.get("style", ""))


def remote_resources(text: str, *, style: bool = False) -> list[str]:
    """Return the addresses that a page (or a style sheet) would fetch from the network."""
    if style:
        return IN_STYLE.findall(text)
    reader = _Resources()
    reader.feed(text)
    return reader.found


def _check(app: Sphinx, exception: Exception | None) -> None:
    if exception is not None or app.builder.format != "html":
        return
    for page in sorted(Path(app.outdir).rglob("*")):
        if page.suffix in (".html", ".css"):
            for address in remote_resources(page.read_text(), style=page.suffix == ".css"):
                logger.warning("%s would fetch %s", page.relative_to(app.outdir), address)


def setup(app: Sphinx) -> dict[str, Any]:
    """Look at what was written."""
    app.connect("build-finished", _check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
