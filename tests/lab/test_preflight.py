"""What is known before training: recipes, networks and devices that do not fit."""

from __future__ import annotations

import pytest

from filterwise.lab.data import load
from filterwise.lab.errors import UsageError
from filterwise.lab.preflight import check_device, try_out


@pytest.fixture(scope="module")
def digits():
    return load("digits")


def test_a_method_without_its_norm_is_told(digits):
    (sentence,) = try_out(["plain"], ["none", "gn+ws", "wa", "ws"], digits)
    assert sentence == (
        "ws on the plain net: Weight Standardization needs an activation norm behind it, and 'ws'"
        " alone means none (4 layers)."
    )


@pytest.mark.parametrize(
    ("net", "recipe", "words"),
    [
        ("plain", "gn(7)+ws", "does not fit the plain net: features.1 .*16 channels"),
        ("vgg11", "none", "vgg11 cannot take pictures of 1x8x8: "),
    ],
)
def test_what_does_not_fit_is_named(digits, net, recipe, words):
    with pytest.raises(UsageError, match=words) as caught:
        try_out([net], [recipe], digits)
    assert "\n" not in str(caught.value)


def test_the_processor_is_always_there():
    check_device("cpu")


def test_an_unknown_device_is_one_line():
    with pytest.raises(UsageError, match=r"--device: 'toaster' cannot be used here: [^\n]+\.$"):
        check_device("toaster")
