"""The reference leaves nothing public out, and its checks can fail."""

from __future__ import annotations

import importlib
import re
import sys

import pytest
import torch

import filterwise as fw
from filterwise.methods.registry import METHODS
from support.documents import DOCS

TEXT = "".join(page.read_text() for page in DOCS.rglob("*.md"))


@pytest.fixture(autouse=True)
def _extensions(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(DOCS / "extensions"), *sys.path])


def extension(name):
    return importlib.import_module(name)


def test_every_public_name_stands_in_a_directive():
    """What the build checks in full, without a build; methods have generated pages."""
    pages = extension("method_pages").pages()
    directives = re.findall(r"^\.\. auto\w+:: ([\w.]+)", TEXT + "".join(pages.values()), re.M)
    named = {name.removeprefix("filterwise.") for name in directives}
    missing = [name for name in fw.__all__ if name not in named]
    assert not missing
    assert "functional" in named


def test_a_public_name_without_a_page_is_found():
    names = set(extension("every_public_name").public_names(fw))
    assert {"filterwise.convert_", "filterwise.functional.weight_align"} <= names
    assert extension("every_public_name").undocumented(names) == []
    without = names - {"filterwise.fold"}
    assert extension("every_public_name").undocumented(without) == ["filterwise.fold"]


def test_pages_that_would_fetch_something_are_found():
    offline = extension("offline")
    assert offline.remote_resources('<a href="https://example.org">x</a><img src="a.png">') == []
    for page in (
        '<script src="https://example.org/x.js"></script>',
        '<link rel="stylesheet" href="//example.org/x.css">',
        '<img src="http://example.org/x.png">',
        '<p style="background: url(https://example.org/x.png)"></p>',
    ):
        assert offline.remote_resources(page), page
    assert offline.remote_resources("@import 'https://example.org/x.css'", style=True)
    assert not offline.remote_resources("a { background: url(x.png) }", style=True)


def test_there_is_a_page_for_every_method_with_its_formula_and_source():
    pages = extension("method_pages").pages()
    assert list(pages) == list(METHODS)
    for name, kind in METHODS.items():
        assert f"`{kind.formula}`" in pages[name]
        assert kind.source in pages[name]
        for preset in kind.presets:
            assert f"{name}(like={preset})" in pages[name]
    assert "needed after each converted layer" in pages["ws"]
    assert "| transposed convolutions | refused |" in pages["equinorm"]
    assert "(-1.3416, -0.4472, 0.4472, 1.3416)" in pages["ws"]


def test_measured_forms_against_the_rules_of_thumb():
    """Deviations follow eps/(2b) inside, eps/sqrt(b) outside and 1/(2n) for the unbiased one."""
    formulas = extension("formulas")
    forms = {form.formula: form for form in formulas.STANDARDIZED}
    w = formulas.filters(576)
    b = 2 / 576
    expected = {
        "c / (sqrt(b) + 1e-5)": 1e-5 / b**0.5,
        "c / sqrt(b + 1e-6)": 1e-6 / (2 * b),
        "c / (sqrt(u) + 1e-5)": 1e-5 / b**0.5 + 1 / (2 * 576),
    }
    for formula, value in expected.items():
        assert formulas.deviation(forms[formula], w) == pytest.approx(value, rel=0.03)
    for form in formulas.SCALED[:1]:
        assert formulas.scale(form, w) == pytest.approx(1, rel=1e-12)


def test_a_form_written_as_a_recipe_is_the_formula_beside_it():
    formulas = extension("formulas")
    w = formulas.filters(64, 0.01)
    c = w - w.mean(1, keepdim=True)
    n = w.shape[1]
    b, u = c.square().mean(1, keepdim=True), c.square().sum(1, keepdim=True) / (n - 1)
    names = {"c": c, "b": b, "u": u, "n": n, "sqrt": lambda v: torch.as_tensor(v).sqrt()}
    names["max"] = lambda v, least: v.clamp(min=least)
    names["norm"] = c.norm(dim=1, keepdim=True)
    for form in (*formulas.STANDARDIZED, *formulas.SCALED):
        formula = form.formula.replace("|c|", "norm").replace("^", "**")
        formula = re.sub(r"([\d)]) (?=c|n\*\*)", r"\1 * ", formula).replace("n b", "n * b")
        formula = re.sub(r"n\*\*-0\.5 c", r"n**-0.5 * c", formula)
        written = eval(formula.replace("n u", "n * u"), {}, names)
        torch.testing.assert_close(form.of(w), written, rtol=1e-6, atol=0, msg=form.formula)
