"""The grammar: what parses, what it means, and what a typo gets."""

from __future__ import annotations

import contextlib
import dataclasses

import hypothesis
import pytest
from hypothesis import strategies

from filterwise.errors import RecipeError
from filterwise.methods.centered_weight_normalization import CenteredWeightNormalization
from filterwise.methods.equinorm import EquilibriumNormalization
from filterwise.methods.equivariant_weight_standardization import EquivariantWeightStandardization
from filterwise.methods.method import Method
from filterwise.methods.parametric_weight_standardization import ParametricWeightStandardization
from filterwise.methods.registry import METHODS
from filterwise.methods.scaled_weight_standardization import ScaledWeightStandardization
from filterwise.methods.weight_align import WeightAlign
from filterwise.methods.weight_centering import WeightCentering
from filterwise.methods.weight_normalization import WeightNormalization
from filterwise.methods.weight_standardization import WeightStandardization
from filterwise.recipe import NORMS, Recipe, as_recipe, split_recipes

WS = WeightStandardization


@pytest.mark.parametrize(
    ("text", "norm", "method"),
    [
        ("none", "none", None),
        ("keep", "keep", None),
        ("bn", "bn", None),
        ("gn(16)", "gn(16)", None),
        ("gn(groups=016)", "gn(16)", None),
        ("ws", "none", WS()),
        ("none+ws", "none", WS()),
        ("gn+ws", "gn", WS()),
        ("ws+gn", "gn", WS()),
        ("gn(8)+wa", "gn(8)", WeightAlign()),
        ("in+centered", "in", WeightCentering()),
        ("keep+cwn", "keep", CenteredWeightNormalization()),
        ("ws(eps=1e-3,eps_inside=true,ddof=1)", "none", WS(1e-3, True, 1)),
        ("ws(eps=+.5)", "none", WS(0.5)),
        ("ws(eps=1e+1)", "none", WS(10.0)),
        ("ws(eps=0)", "none", WS(0.0)),
        ("wn(start=-2.)", "none", WeightNormalization(start=-2.0)),
        ("wa(constant=preserving)", "none", WeightAlign("preserving")),
        ("pws(gamma=1e-3)", "none", ParametricWeightStandardization(1e-3)),
        ("pws(gamma=large)", "none", ParametricWeightStandardization("large")),
        ("pws(gamma=0.25 * 2 / n)", "none", ParametricWeightStandardization("0.25*2/n")),
        ("sws(activation=leaky_relu_0.2)", "none",
         ScaledWeightStandardization("leaky_relu_0.2")),
        ("sws(activation=leaky_relu_-1e-3)", "none",
         ScaledWeightStandardization("leaky_relu_-1e-3")),
        ("equinorm(single_pass=true,fraction=0.25)", "none",
         EquilibriumNormalization(single_pass=True, fraction=0.25)),
        (" GN ( 16 )\t+ WS ( Eps = 1E-3 ,\n DDOF=1 ) ", "gn(16)", WS(1e-3, ddof=1)),
    ],
)  # fmt: skip
def test_text_means(text: str, norm: str, method: Method | None) -> None:
    assert Recipe.parse(text) == Recipe(norm, method)


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("WS + GN", "gn+ws"),
        ("none+wa", "wa"),
        ("none", "none"),
        ("ws(ddof=1, eps=1e-5)", "ws(ddof=1)"),
        ("ws(ddof=1, eps=0)", "ws(eps=0.0, ddof=1)"),
        ("gn(032)", "gn(32)"),
        ("ws(like=official)", "ws(ddof=1)"),
        ("ws(like=bit)", "ws(eps=1e-10, eps_inside=true)"),
        ("gn+ws(like=TIMM)", "gn+ws(eps=1e-06, eps_inside=true)"),
        ("ws(like=timm_bit)", "ws(eps=1e-08, eps_inside=true)"),
        ("ws(like=vit_hybrid)", "ws"),
        ("ws(eps=1e-3, like=timm)", "ws(eps=0.001, eps_inside=true)"),
        ("ws(like=timm, eps=1e-3)", "ws(eps=0.001, eps_inside=true)"),
        ("ws(like=timm, eps_inside=false)", "ws(eps=1e-06)"),
        ("pws(gamma=.1*2/n)", "pws(gamma=0.1*2/n)"),
        ("pws(gamma=relative)", "pws"),
        ("pws(gamma=none)", "pws(gamma=none)"),
    ],
)
def test_canonical_text(text: str, canonical: str) -> None:
    assert str(Recipe.parse(text)) == canonical
    assert str(Recipe.parse(canonical)) == canonical


@pytest.mark.parametrize("name", [name for name, kind in METHODS.items() if kind.presets])
def test_every_preset_is_its_options(name: str) -> None:
    for preset, options in METHODS[name].presets.items():
        assert Recipe.parse(f"{name}(like={preset})").method == METHODS[name](**options)


FRACTIONS = strategies.floats(0.01, 1.0)
EPS = strategies.floats(0.0, 1e6, allow_subnormal=False) | strategies.integers(0, 5)
BOOLEANS = strategies.booleans()


def _any_method() -> strategies.SearchStrategy[Method]:
    """Draw methods over all of their options that can be combined."""
    build = strategies.builds
    starts = strategies.floats(-100, 100)
    return strategies.one_of(
        build(
            WS,
            eps=EPS,
            eps_inside=BOOLEANS,
            ddof=strategies.sampled_from([0, 1]),
            centre=BOOLEANS,
            moment=strategies.sampled_from(["raw", "central"]),
            affine=BOOLEANS,
            scale=strategies.sampled_from(["unit", "fan_in"]),
        ),
        build(
            WeightAlign,
            constant=strategies.sampled_from(["he", "preserving"]),
            eps=EPS,
            divide=BOOLEANS,
            factor=strategies.floats(0.01, 10.0),
            learn_gain=BOOLEANS,
        ),
        build(
            ParametricWeightStandardization,
            gamma=EPS
            | strategies.sampled_from(["relative", "large", "medium", "small", "none"])
            | FRACTIONS.map(lambda share: f"{share!r} * 2/n"),
        ),
        build(
            EquilibriumNormalization,
            single_pass=BOOLEANS,
            fraction=FRACTIONS,
            affine=BOOLEANS,
            geometry=strategies.sampled_from(["exact", "paper"]),
            momentum=FRACTIONS,
            synchronize=BOOLEANS,
        ),
        build(WeightNormalization, eps=EPS, start=starts | strategies.just("norm")),
        build(CenteredWeightNormalization, eps=EPS, learn_gain=BOOLEANS),
        build(
            ScaledWeightStandardization,
            activation=strategies.sampled_from(["relu", "identity", "leaky_relu_0.2", "gelu_tanh"]),
            eps=EPS,
            floor=BOOLEANS,
            ddof=strategies.sampled_from([0, 1]),
        ),
        strategies.just(WeightCentering()),
    )


RECIPES = strategies.builds(
    Recipe,
    norm=strategies.sampled_from(list(NORMS)) | strategies.integers(1, 999).map("gn({})".format),
    method=strategies.none() | _any_method(),
)


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(recipe=RECIPES)
def test_canonical_text_parses_back_to_itself(recipe: Recipe) -> None:
    text = str(recipe)
    again = Recipe.parse(text)
    assert again == recipe
    assert str(again) == text


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(recipe=RECIPES, data=strategies.data())
def test_case_spaces_and_order_do_not_matter(recipe: Recipe, data: strategies.DataObject) -> None:
    spaces = strategies.text(" \t\n", max_size=2)
    terms = str(recipe).split("+") if "e+" not in str(recipe) else [str(recipe)]
    text = "+".join(data.draw(strategies.permutations(terms)))
    pieces = [
        data.draw(spaces) + letter + data.draw(spaces) if letter in "+(),=" else letter
        for letter in text
    ]
    text = "".join(pieces)
    if data.draw(BOOLEANS):
        text = text.upper()
    # A plus in a number's exponent is no separator and takes no spaces around it.
    hypothesis.assume("e+" not in str(recipe))
    assert Recipe.parse(text) == recipe


@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(text=strategies.text("gnwsapeq+(),=*/.-0123 \tİ\u00df", max_size=25))
def test_any_text_is_read_or_refused(text: str) -> None:
    with contextlib.suppress(RecipeError):
        recipe = Recipe.parse(text)
        assert Recipe.parse(str(recipe)) == recipe


@pytest.mark.parametrize(
    ("text", "position", "fragment", "words"),
    [
        ("gn+wss", 4, "wss", ["unknown norm or method", "Nearest: 'ws' (Weight Standardization)",
                              "filterwise.methods()"]),
        ("batch_norm", 1, "batch_norm", ["Nearest: 'bn'"]),
        ("LayerNorm+ws", 1, "LayerNorm", ["Nearest: 'ln'"]),
        ("weight_align", 1, "weight_align", ["Nearest: 'wa' (WeightAlign)"]),
        ("qqqq", 1, "qqqq", ["Norms: bn, gn, ln, in, none, keep"]),
        ("gn ws", 4, "ws", ["expected '+' or the end"]),
        ("gn++ws", 4, "", ["a name is missing"]),
        ("gn+", 4, "", ["a name is missing"]),
        ("gn,ws", 3, ",ws", ["expected '+' or the end"]),
        ("16", 1, "16", ["expected a name"]),
        ("gn+bn", 4, "bn", ["a second norm beside gn"]),
        ("none+gn", 6, "gn", ["a second norm beside none"]),
        ("ws+gn+wa", 7, "wa", ["a second method beside ws"]),
        ("ws+ws", 4, "ws", ["a second method beside ws"]),
        ("ws(eps=1", 3, "(", ["not closed"]),
        ("ws)", 3, ")", ["not opened"]),
        ("ws((eps=1))", 4, "(", ["inside another"]),
        ("gn()", 4, "", ["an argument is missing"]),
        ("ws(eps=1,)", 10, "", ["an argument is missing"]),
        ("gn(0)", 4, "0", ["at least 1"]),
        ("gn(-4)", 4, "-4", ["at least 1"]),
        ("gn(1.5)", 4, "1.5", ["at least 1"]),
        ("gn(8,8)", 6, "8", ["gn takes one number"]),
        ("gn(eps=1)", 4, "eps=1", ["gn has no such option"]),
        ("ln(2)", 4, "2", ["ln takes no argument"]),
        ("ws(1e-3)", 4, "1e-3", ["an option of ws without its name", "eps, eps_inside"]),
        ("ws(epss=1e-3)", 4, "epss", ["unknown option of ws", "Nearest: 'eps'"]),
        ("pws(gama=1)", 5, "gama", ["Nearest: 'gamma'", "Options of pws: gamma, like."]),
        ("centered(eps=1)", 10, "eps", ["Options of centered: none."]),
        ("wa(like=timm)", 4, "like", ["unknown option of wa"]),
        ("ws(like=tim)", 9, "tim", ["unknown preset of ws", "Nearest: 'timm'"]),
        ("ws(eps=1, eps=2)", 11, "eps=2", ["eps is given twice"]),
        ("ws(like=timm, like=bit)", 15, "like=bit", ["like is given twice"]),
        ("ws(eps=-1)", 8, "-1", ["eps must be a number >= 0, got -1"]),
        ("ws(eps=true)", 8, "true", ["eps must be a number >= 0, got True"]),
        ("ws(eps=1e999)", 8, "1e999", ["eps must be a number"]),
        ("ws(eps=nan)", 8, "nan", ["eps must be a number"]),
        ("ws(eps=)", 4, "eps=", ["a value is missing after eps="]),
        ("ws(=1)", 4, "=1", ["expected the name of an option"]),
        ("ws(eps=1 2)", 8, "1 2", ["unreadable value"]),
        ("gn + wa(constant=hee)", 18, "hee", ["constant must be one of he, preserving",
                                              "Nearest: 'he'"]),
        ("sws(activation=relo)", 16, "relo", ["activation must be one of", "Nearest: 'relu'"]),
        ("ws(ddof=2)", 9, "2", ["ddof must be one of 0, 1, got 2"]),
        ("ws(divide=false, centre=false)", 25, "false", ["cannot both be false"]),
        ("ews", 1, "ews", ["filterwise.EquivariantWeightStandardization(label=...)"]),
        ("gn+ews(label=3)", 8, "label=3", ["cannot be written"]),
    ],
)  # fmt: skip
def test_refusal_says_where_and_what(
    text: str, position: int, fragment: str, words: list[str]
) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(text)
    first, shown, caret = str(caught.value).split("\n")
    place = len(caret) - len(caret.lstrip())
    assert f'in "{text}", position {position}' in first
    assert shown == f"    {text}"
    assert place - 4 == position - 1 or not fragment
    marked = shown[place : len(caret)]
    assert marked.startswith(fragment)
    assert set(caret.strip()) == {"^"}
    assert len(caret.strip()) == max(len(fragment), 1)
    for word in words:
        assert word in first


def test_position_is_the_typed_texts() -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.parse("  GN\n+ \tWSS ")
    assert str(caught.value).split("\n")[1:] == ["      GN +  WSS ", "            ^^^"]
    assert "position 9: 'WSS'" in str(caught.value)


@pytest.mark.parametrize("text", ["", "   ", "\n"])
def test_empty_text_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="the recipe is empty"):
        Recipe.parse(text)


def test_labels_show_in_the_text_and_are_refused_in_it() -> None:
    method = EquivariantWeightStandardization(label=[0] * 16 + [1] * 16)
    text = str(Recipe("gn", method))
    assert text == "gn+ews(label=<32 labels>)"
    with pytest.raises(RecipeError, match="EquivariantWeightStandardization"):
        Recipe.parse(text)


def test_as_recipe_takes_text_recipe_and_method() -> None:
    recipe = Recipe("gn", WS())
    assert as_recipe("gn+ws") == recipe
    assert as_recipe(recipe) is recipe
    assert as_recipe(WS()) == Recipe("none", WS())


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "a NoneType"),
        (16, "a int"),
        (WS, r"the class WeightStandardization \(call it: WeightStandardization\(\)\)"),
    ],
)
def test_as_recipe_refuses_anything_else(value: object, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        as_recipe(value)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("norm", ["GN", "gn(0)", "gn( 16)", "", "ws", 16])
def test_recipe_refuses_an_unknown_norm(norm: object) -> None:
    with pytest.raises(RecipeError, match="norm must be one of bn, gn"):
        Recipe(norm)  # pyright: ignore[reportArgumentType]


def test_recipe_refuses_what_is_no_method_and_is_frozen() -> None:
    with pytest.raises(RecipeError, match="call it: WeightAlign"):
        Recipe("gn", WeightAlign)  # pyright: ignore[reportArgumentType]
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().norm = "gn"  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(RecipeError, match="must be a string, got a int"):
        Recipe.parse(3)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("bn", ["bn"]),
        (" bn ,gn+ws, ", None),
        ("bn,gn+ws(eps=1e-5, ddof=1) , wa", ["bn", "gn+ws(eps=1e-5, ddof=1)", "wa"]),
        ("ws(eps=1,wa", ["ws(eps=1,wa"]),
        ("ws),wa", ["ws)", "wa"]),
        ("", None),
        ("bn,,gn", None),
    ],
)
def test_split_at_commas_outside_parentheses(text: str, parts: list[str] | None) -> None:
    if parts is None:
        with pytest.raises(RecipeError, match="a recipe is missing"):
            split_recipes(text)
    else:
        assert split_recipes(text) == parts
