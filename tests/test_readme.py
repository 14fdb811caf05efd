"""What the README and CONTRIBUTING promise."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from filterwise import recipe
from filterwise.methods.registry import METHODS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_ten_lines_run(capsys):
    block = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0]
    assert (
        len([line for line in block.splitlines() if line and not line.startswith("import")]) <= 10
    )
    names: dict = {}
    exec(compile(block, "README.md", "exec"), names)
    plain = names["plain"]
    assert not [m for m in plain.modules() if type(m).__name__.startswith("Filterwise")]
    x = torch.randn(1, 3, 64, 64)
    out, model = plain.eval()(x), names["model"].eval()
    torch.testing.assert_close(out, model(x), rtol=1e-4, atol=1e-4)
    assert "conv1" in capsys.readouterr().out


def test_every_recipe_that_is_named_can_be_read():
    for name in METHODS:
        assert f"`{name}`" in README
    norms = "bn|gn|ln|in|none|keep"
    for text in re.findall(rf"`((?:{norms})(?:\([^`)]*\))?\+[^`]+)`", README):
        recipe.Recipe.parse(text)


def test_every_make_target_that_is_named_exists():
    makefile = (ROOT / "Makefile").read_text()
    named = set(re.findall(r"make ([a-z]+)\b", README + (ROOT / "CONTRIBUTING.md").read_text()))
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    assert {"demo", "test", "check"} <= {name for name in named if name in targets}
    assert not {name for name in named if re.search(rf"^    make {name}\b", README, re.M)} - targets


def test_contributing_names_files_that_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for path in re.findall(r"`((?:src|tests)/[\w/.]+\.py)`", text):
        assert path.endswith("your_method.py") or (ROOT / path).exists(), path
    for name in re.findall(r"`(\w+\.py)`", text):
        assert list(ROOT.glob(f"src/filterwise/**/{name}")), name


def test_every_page_that_is_linked_exists():
    links = re.findall(r"\]\((?!https?:)([^)#]+)", README + (ROOT / "CONTRIBUTING.md").read_text())
    assert len(links) > 5
    for link in links:
        assert (ROOT / link).exists(), link
