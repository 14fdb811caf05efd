"""What a page is made of, for tests of its structure."""

from __future__ import annotations

import re
from html.parser import HTMLParser

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Outline(HTMLParser):
    """Collects what the rules below speak of, and checks that every element is closed."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.refers, self.links = [], [], [], []
        self.headings, self.tags, self.headers = [], [], []

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.tags.append((tag, found))
        if tag not in VOID:
            self.open.append(tag)
        if "id" in found:
            self.ids.append(found["id"])
        for name in ("aria-labelledby", "aria-describedby"):
            self.refers += found.get(name, "").split()
        for name in ("href", "xlink:href", "src"):
            if name in found:
                self.links.append(found[name])
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag == "th":
            self.headers.append(found.get("scope"))

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def outline_of(html):
    found = Outline()
    found.feed(html)
    found.close()
    return found
