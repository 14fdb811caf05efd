"""Every block of every page of the documentation is run."""

from __future__ import annotations

import warnings

import pytest

from support.documents import DOCS, KNOWN, QUIET, languages, pages, run_page


@pytest.mark.parametrize("page", pages())
def test_blocks_run(page, tmp_path):
    with warnings.catch_warnings():
        # Advice of the frameworks that pages train with, on themselves; ours stay errors.
        for kind in (DeprecationWarning, FutureWarning):
            warnings.filterwarnings("ignore", category=kind)
        warnings.filterwarnings("ignore", module="lightning")
        run_page(DOCS / page, tmp_path)


@pytest.mark.parametrize("page", pages())
def test_every_block_is_of_a_kind_that_is_run(page):
    assert languages((DOCS / page).read_text()) <= KNOWN | QUIET


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("```python\n1 / 0\n```", "division"),
        ("```python\nprint(1)\n```\n\n```text\n2\n```", "Expected"),
        ("```text\n2\n```", "no block before"),
        ("```console\n$ filterwise inspect no_such_model\n```", "exit 2"),
        ("```console\n$ pip install '.[nothing]'\n```", "nothing"),
        ("```console\n$ make nothing\n```", "make nothing"),
        ("```console\n$ rm -rf /\n```", "no way to run"),
    ],
)
def test_a_wrong_block_fails(text, complaint, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(text + "\n")
    with pytest.raises(Exception, match=complaint):
        run_page(page, tmp_path)
