"""Pictures and comparisons that several tests look at."""

from __future__ import annotations

import numpy
import pytest
from PIL import Image

from filterwise.lab import timing
from support.commands import call, shared


@pytest.fixture(autouse=True, scope="session")
def _short_timing():
    """Let the timing pass take its least number of rounds; no test looks at what it measures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "SECONDS", 0.0)
        yield


def draw_stripes(root):
    """Draw stripes along and across: 40 pictures to train on, 20 to test on."""
    generator = numpy.random.default_rng(0)
    for half, count in (("train", 20), ("test", 10)):
        for name, axis in (("across", 0), ("along", 1)):
            folder = root / half / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 60, (12, 12, 3))
                pixels.swapaxes(0, axis)[::4] += 150
                image = Image.fromarray(pixels.astype(numpy.uint8))
                image.save(folder / f"{number}.png")


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    """Give a class-folder tree."""
    return shared(tmp_path_factory, "stripes", draw_stripes)


@pytest.fixture(scope="session")
def compared(tree, tmp_path_factory):
    """Give a whole comparison: its standard output, standard error, folder and words."""
    words = ["compare", "--data", tree, "--size", "8", "--recipes", "none,gn+ws", "--epochs", "3"]
    words += ["--micro-batch", "3,20", "--seeds", "2", "--out"]

    def make(out):
        result = call(*words, out)
        assert result.exit_code == 0, result.output
        (out / "stdout").write_text(result.stdout)
        (out / "stderr").write_text(result.stderr)

    out = shared(tmp_path_factory, "compared", make)
    return (out / "stdout").read_text(), (out / "stderr").read_text(), out, words
