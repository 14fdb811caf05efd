"""How far apart the formulas are that go by the same name, measured in float64.

``python docs/extensions/formulas.py`` prints both tables of the page on numerics.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from tables import table
from torch import Tensor

import filterwise as fw
from filterwise.filters import FilterLayout
from filterwise.methods.method import WeightMethod

FILTERS = 256
HE = (9, 64, 576, 4608)
SMALL = 1e-3
"""Standard deviation of filters that weight decay has shrunk."""


@dataclass(frozen=True)
class Form:
    """One published formula.

    Attributes:
        whose: Who computes it.
        formula: In plain text; m mean, c = w - m, b and u the variance by n and by n - 1.
        recipe: How it is written in filterwise, or empty.
        compute: It, where filterwise has no recipe for it.
    """

    whose: str
    formula: str
    recipe: str
    compute: Callable[[Tensor], Tensor] | None = None

    def of(self, filters: Tensor) -> Tensor:
        """Return the effective weight of filters ``(filters, n)``, gains at 1."""
        if self.compute is not None:
            return self.compute(filters)
        method = fw.Recipe.parse(self.recipe).method
        assert isinstance(method, WeightMethod)
        return method.effective(filters, FilterLayout())


def _centred(w: Tensor) -> Tensor:
    return w - w.mean(1, keepdim=True)


def _biased(w: Tensor) -> Tensor:
    return w.var(1, correction=0, keepdim=True)


STANDARDIZED = (
    Form("official PyTorch code; mmcv `ConvWS2d`", "c / (sqrt(u) + 1e-5)", "ws(like=official)"),
    Form("the paper's Eq. 2; official TensorFlow code; ViT-hybrid (Flax)",
         "c / (sqrt(b) + 1e-5)", "ws"),
    Form("Batch-Channel Normalization code; mmcv `ConvAWS2d` at gain 1",
         "c / sqrt(u + 1e-5)", "ws(like=bcn)"),
    Form("TensorFlow DeepLab; FBA Matting", "c / sqrt(b + 1e-5)", "ws(eps=1e-5, eps_inside=true)"),
    Form("timm `StdConv2d`, as the class is", "c / sqrt(b + 1e-6)", "ws(like=timm)"),
    Form("timm's BiT and ViT-hybrid; Hugging Face BiT", "c / sqrt(b + 1e-8)", "ws(like=timm_bit)"),
    Form("Google BiT; Composer; Keras recipe", "c / sqrt(b + 1e-10)", "ws(like=bit)"),
    Form("denoising-diffusion until 2023, float32 input", "c / sqrt(max(b, 1e-5))", "",
         lambda w: _centred(w) / _biased(w).clamp(min=1e-5).sqrt()),
    Form("the same, half-precision input", "c / sqrt(max(b, 1e-3))", "",
         lambda w: _centred(w) / _biased(w).clamp(min=1e-3).sqrt()),
    Form("PWS's TensorFlow baseline of that name", "c / sqrt(b + 1e-3)",
         "ws(eps=1e-3, eps_inside=true)"),
    Form("a tutorial's copies (inverted until 2024)", "c * sqrt(b + 1e-5)", "",
         lambda w: _centred(w) * (_biased(w) + 1e-5).sqrt()),
)  # fmt: skip
"""Weight Standardization, eleven ways."""

SCALED = (
    Form("WeightAlign, Eq. 10", "sqrt(2/n) c / sqrt(b)", "wa(eps=0)"),
    Form("CWN's PyTorch code, as it comes", "1.414 c / (|c| + 1e-5)", "",
         lambda w: 1.414 * _centred(w) / (_centred(w).norm(dim=1, keepdim=True) + 1e-5)),
    Form("DeepMind NFNet, the ReLU's gain folded in",
         "1.7139588594436646 c / sqrt(max(n b, 1e-4))", "sws(public=true)"),
    Form("timm's NF models, ReLU", "1.7139588594436646 n^-0.5 c / sqrt(b + 1e-5)",
         "sws(like=timm)"),
    Form("nfnets-pytorch `WSConv2d`", "c / sqrt(max(n u, 1e-4))", "sws(like=nfnets_pytorch)"),
    Form("PWS, gamma 1e-3", "sqrt(2/n) c / sqrt(b + 1e-3)", "pws(gamma=large)"),
    Form("PWS, gamma 1e-4", "sqrt(2/n) c / sqrt(b + 1e-4)", "pws(gamma=medium)"),
    Form("PWS, gamma 1e-5", "sqrt(2/n) c / sqrt(b + 1e-5)", "pws(gamma=small)"),
    Form("PWS, gamma 0.1*2/n", "sqrt(2/n) c / sqrt(b + 0.2/n)", "pws"),
)  # fmt: skip
"""Methods that bring filters near He's scale, at gain 1."""


def filters(fan_in: int, deviation: float | None = None) -> Tensor:
    """Return normal filters in float64, with He's standard deviation or the one given."""
    generator = torch.Generator().manual_seed(0)
    scale = math.sqrt(2 / fan_in) if deviation is None else deviation
    return torch.randn(FILTERS, fan_in, generator=generator, dtype=torch.float64) * scale


def deviation(form: Form, w: Tensor) -> float:
    """Return by how much a form misses ``c / sqrt(b)``, relative, in the median filter."""
    exact = _centred(w) / _biased(w).sqrt()
    return float(((form.of(w) - exact).norm(dim=1) / exact.norm(dim=1)).median())


def scale(form: Form, w: Tensor) -> float:
    """Return a form's filters as a multiple of WeightAlign's, in the median filter."""
    align = math.sqrt(2 / w.shape[1]) * _centred(w) / _biased(w).sqrt()
    return float((form.of(w).norm(dim=1) / align.norm(dim=1)).median())


def standardization_table() -> str:
    """Return the table of Weight Standardization's forms: deviations in percent."""
    samples = [*(filters(n) for n in HE), filters(576, SMALL)]
    headers = ["whose", "formula", "recipe", *(f"n={n}" for n in HE), "n=576, std 0.001"]
    return table(headers, [_row(form, samples, _percent) for form in STANDARDIZED], right=5)


def scaled_table() -> str:
    """Return the table of the scaled methods: multiples of WeightAlign."""
    samples = [filters(n) for n in HE]
    headers = ["whose", "formula", "recipe", *(f"n={n}" for n in HE)]
    return table(headers, [_row(form, samples, _multiple) for form in SCALED], right=4)


def _row(form: Form, samples: list[Tensor], shown: Callable[[Form, Tensor], str]) -> list[str]:
    recipe = f"`{form.recipe}`" if form.recipe else "none"
    return [form.whose, f"`{form.formula}`", recipe, *(shown(form, w) for w in samples)]


def _percent(form: Form, w: Tensor) -> str:
    found = 100 * deviation(form, w)
    if found < 1e-4:
        return "0" if found < 1e-10 else "<0.0001"
    return f"{found:.1f}" if found >= 10 else f"{found:.2g}"


def _multiple(form: Form, w: Tensor) -> str:
    return f"{scale(form, w):.4f}"


if __name__ == "__main__":
    print(standardization_table())
    print(scaled_table())
