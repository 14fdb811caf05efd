"""What is trained and recorded: small nets on noise and on real digits."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

import filterwise as fw
from filterwise.lab.data import load
from filterwise.lab.engine import Batches, Trainer
from filterwise.lab.settings import RunSettings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from filterwise.lab.data import PictureSet

    Records = list[dict[str, Any]]

__all__ = [
    "Epochs",
    "Setting",
    "gradient_pass",
    "noise_net",
    "toy_balance",
    "train",
    "variance_run",
]

PICTURES = 128
"""Pictures that activations are drawn from, as the papers have it."""

CONVOLUTIONS = "features.*"


@dataclass(frozen=True)
class Setting:
    """What a command asks for.

    Attributes:
        epochs: Of each training run.
        seed: Of weights and order of pictures.
        width: Channels of the net on noise.
        data: Data set of the training runs.
        root: Folder in which data sets lie.
        learning_rate: Of the runs that draw distributions.
    """

    epochs: int = 8
    seed: int = 0
    width: int = 64
    data: str = "digits"
    root: str = "data"
    learning_rate: float = 0.1


@dataclass
class Epochs:
    """A trained run.

    Attributes:
        records: Distributions of weights and activations, whose step is the epoch.
        gradients: Signals of gradients, whose step is the epoch, of its first step.
        steps: Other signals, whose step is the optimizer step.
        curve: Errors by epoch.
        words: Mean scale and shift of the drawn layer: its gain and bias, or its norm's.
        pictures: How many there are to train and to test on.
    """

    records: Records = field(default_factory=list)
    gradients: Records = field(default_factory=list)
    steps: Records = field(default_factory=list)
    curve: list[dict[str, float]] = field(default_factory=list)
    words: str = ""
    pictures: tuple[int, int] = (0, 0)


def noise_net(recipe: str, setting: Setting) -> nn.Module:
    """Return the eight-layer net: seven 3x3 convolutions with ReLU, and a classifier of 10.

    No bias; He's start; 3 x 32 x 32 in. The recipe goes to the convolutions.
    """
    torch.manual_seed(setting.seed)
    layers: list[nn.Module] = []
    channels = 3
    for _ in range(7):
        convolution = nn.Conv2d(channels, setting.width, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
        layers += [convolution, nn.BatchNorm2d(setting.width), nn.ReLU()]
        channels = setting.width
    classifier = nn.Linear(channels, 10, bias=False)
    nn.init.kaiming_normal_(classifier.weight, nonlinearity="relu")
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), classifier)
    _convert(net, recipe)
    return net


def variance_run(recipe: str, setting: Setting) -> Records:
    """Send noise through the untrained eight-layer net and return what its layers do to it."""
    net = noise_net(recipe, setting)
    noise = torch.randn(
        PICTURES, 3, 32, 32, generator=torch.Generator().manual_seed(setting.seed + 1)
    )
    return fw.diagnose.propagation(net, noise)


def _convert(net: nn.Module, recipe: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fw.FilterwiseWarning)
        fw.convert_(net, recipe)


class _Run:
    """One network with its pictures, an epoch at a time."""

    def __init__(self, recipe: str, setting: Setting, data: PictureSet, rate: float) -> None:
        self.settings = RunSettings(
            data=data.name,
            data_sha256=data.sha256,
            net="plain",
            recipe=recipe,
            initialization="default",
            learning_rate=rate,
            micro_batch=64,
            seed=setting.seed,
            epochs=setting.epochs,
        )
        device = torch.device("cpu")
        self.batches = Batches(data, self.settings.step_size, setting.seed, device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", fw.FilterwiseWarning)
            self.trainer = Trainer(
                self.settings, data, device, steps=self.batches.steps * setting.epochs
            )

    @property
    def model(self) -> nn.Module:
        return self.trainer.model

    def sample(self) -> Tensor:
        """Return the first test pictures, always the same."""
        pictures, _ = next(iter(self.batches.test()))
        return pictures[:PICTURES]

    def error(self, pictures: Tensor, labels: Tensor) -> float:
        self.model.eval()
        with torch.no_grad():
            wrong = [
                (self.model(self._normalized(part)).argmax(1) != other).sum().item()
                for part, other in zip(pictures.split(256), labels.split(256), strict=True)
            ]
        self.model.train()
        return sum(wrong) / len(labels)

    def _normalized(self, pictures: Tensor) -> Tensor:
        return (pictures.float() - self.batches.mean) / self.batches.deviation


def train(
    recipe: str,
    setting: Setting,
    *,
    layers: Sequence[str] = (),
    drawn: str = "",
    shares: bool = False,
    steps: Sequence[str] = (),
    steps_layer: str = "",
    rate: float | None = None,
) -> Epochs:
    """Train the lab's plain net and record on the way.

    Args:
        recipe: What it is converted to.
        setting: Epochs, seed, data.
        layers: Layers whose activations on 128 test pictures are recorded after every epoch; of the
            first of them the weights too.
        drawn: Layer whose gain and bias are told.
        shares: Whether to record gradients at the first step of every epoch.
        steps: Signals to record at every step.
        steps_layer: Of which layer.
        rate: Learning rate at the start; None is the setting's.
    """
    data = load(setting.data, root=setting.root)
    run = _Run(recipe, setting, data, setting.learning_rate if rate is None else rate)
    found = Epochs(pictures=(len(data.train_labels), len(data.test_labels)))
    for epoch in range(1, setting.epochs + 1):
        _epoch(run, found, epoch, shares, steps, steps_layer)
        train_error = run.error(data.train_pictures, data.train_labels)
        test_error = run.error(data.test_pictures, data.test_labels)
        found.curve.append({"epoch": epoch, "train_error": train_error, "test_error": test_error})
        if layers:
            seen = fw.diagnose.propagation(run.model, run.sample(), layers=list(layers))
            wanted = ["weight_histogram", "effective_weight_histogram"]
            seen += fw.diagnose.weights(run.model, signals=wanted, layers=layers[0])
            found.records += [{**record, "step": epoch} for record in seen]
    if drawn:
        found.words = _scale_words(run.model, drawn)
    return found


def _epoch(
    run: _Run, found: Epochs, epoch: int, shares: bool, steps: Sequence[str], layer: str
) -> None:
    wanted = ["gradients"] if shares else list(steps)
    every = run.batches.steps if shares else 1
    if not wanted:
        for pictures, labels in run.batches.epoch():
            run.trainer.step(pictures, labels)
        return
    layers = layer or CONVOLUTIONS
    with fw.diagnose.record(run.model, signals=wanted, every=every, layers=layers) as trace:
        for pictures, labels in run.batches.epoch():
            run.trainer.step(pictures, labels)
    before = (epoch - 1) * run.batches.steps
    for record in trace.records():
        if shares and record["layer"] != "features.0":
            found.gradients.append({**record, "step": epoch})
        elif not shares:
            found.steps.append({**record, "step": before + record["step"] + 1})


def _scale_words(model: nn.Module, name: str) -> str:
    """Return mean scale and shift of a layer: of its gain and bias, or of the norm behind it."""
    layer: Any = model.get_submodule(name)
    parent, _, place = name.rpartition(".")
    following: Any = model.get_submodule(parent)[int(place) + 1] if place.isdigit() else layer  # type: ignore[index]
    scale, shift = getattr(layer, "gain", None), getattr(layer, "bias", None)
    if scale is None:
        scale, shift = getattr(following, "weight", None), getattr(following, "bias", None)
    if scale is None:
        return ""
    words = f"mean gain {float(scale.detach().mean()):.3f}"
    return words if shift is None else f"{words}, shift {float(shift.detach().mean()):+.3f}"


def gradient_pass(recipe: str, setting: Setting, rate: float = 0.01) -> Records:
    """Run forward and backward for every batch of an untrained net, without an update."""
    data = load(setting.data, root=setting.root)
    run = _Run(recipe, setting, data, rate)
    wanted = ["gradients", "activations"]
    with fw.diagnose.record(run.model, signals=wanted) as trace:
        for pictures, labels in run.batches.epoch():
            functional.cross_entropy(run.model(pictures), labels).backward()
            trace.step(lr=rate)
            run.model.zero_grad()
    return trace.records()


def toy_balance(setting: Setting, epochs: int = 40) -> tuple[dict[int, list[float]], Records]:
    """Train one 3x3 EquiNorm kernel on 3x3 pictures with cyclic padding to tell a picture's shift.

    Returns:
        The effective kernel at the first, the middle and the last epoch, and the contributions of
        positive and negative weights, summed over the nine outputs, of every epoch.
    """
    torch.manual_seed(setting.seed)
    net = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular", bias=False))
    fw.convert_(net, "equinorm(affine=false)", select="0")
    pictures, target = torch.rand(32, 1, 3, 3), torch.randn(3, 3)
    wanted = functional.conv2d(
        functional.pad(pictures, (1, 1, 1, 1), mode="circular"), target[None, None]
    )
    wanted = (wanted - wanted.mean()) / wanted.std()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02)
    kernels: dict[int, list[float]] = {}
    records: Records = []
    with torch.no_grad():
        net(pictures)  # its running mean is then that of these pictures, which stay the same
    for epoch in range(epochs + 1):
        for record in fw.diagnose.contributions(net, pictures):
            total = [9 * value for value in record["value"]]
            records.append({**record, "step": epoch, "value": total})
        if epoch in (0, epochs // 2, epochs):
            net.eval()
            kernels[epoch] = fw.fold(net)[0].weight.detach().flatten().tolist()  # type: ignore[index]
            net.train()
        optimizer.zero_grad()
        functional.mse_loss(net(pictures), wanted).backward()
        optimizer.step()
    return kernels, records
