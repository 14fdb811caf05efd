"""Fine-tuning: what a trained BatchNorm network keeps when it is converted.

    python -m filterwise.lab.fine_tune --out results/fine_tune/digits

trains a network with BatchNorm, converts copies of it by each recipe in three ways (as `convert_`
does by itself; with ``preserve=True``; with a loader too), and measures the test error right after
the conversion and after a short fine-tuning, with whole steps and with micro-batches of two. It is
the fine-tuning experiment of the WeightAlign paper (Shi et al. 2020, IV-C: a network trained with
BN, then fine-tuned with WA on its filters) on small data.
"""

from __future__ import annotations

import argparse
import copy
import json
import shlex
import statistics
import sys
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import filterwise as fw
from filterwise.lab.data import PictureSet, load
from filterwise.lab.engine import Batches, be_deterministic
from filterwise.lab.errors import LabError, UsageError
from filterwise.lab.hardware import hardware, versions
from filterwise.lab.nets import build
from filterwise.lab.results import write_whole
from filterwise.recipe import split_recipes
from filterwise.report import text_table

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

__all__ = ["Result", "Setting", "main", "measure", "page"]

RECIPES = ("bn+wa", "gn+ws", "pws", "wa")
STARTS = ("as converted", "preserve", "preserve, loader")
UNCONVERTED = "bn"
STEP, DECAY, MOMENTUM = 64, 5e-4, 0.9
LOADER_STEPS = 8


@dataclass(frozen=True)
class Setting:
    """One run of the experiment; everything that decides its figures."""

    net: str = "plain"
    epochs: int = 6
    lr: float = 0.1
    tune_epochs: int = 2
    tune_lr: float = 0.01
    micro_batches: tuple[int, ...] = (64, 2)
    recipes: tuple[str, ...] = RECIPES
    device: str = "cpu"


@dataclass(frozen=True)
class Result:
    """Test errors of one conversion, from 0 to 1.

    Attributes:
        seed: Of the first weights and of the pictures' order.
        recipe: The recipe; ``bn`` is the network itself, not converted.
        start: One of `STARTS`.
        trained: Error of the BatchNorm network in evaluation mode.
        converted: Error right after the conversion.
        tuned: Error after fine-tuning, by micro-batch; where the loss stopped being finite, of the
            network as it stood then.
    """

    seed: int
    recipe: str
    start: str
    trained: float
    converted: float
    tuned: dict[int, float]


def measure(data: PictureSet, setting: Setting, seed: int) -> Iterator[Result]:
    """Train one network and fine-tune every conversion of it.

    Yields:
        The network's own result first, then one for each recipe and start.
    """
    device = torch.device(setting.device)
    torch.manual_seed(seed)
    model, _ = build(setting.net, "bn", data.channels, len(data.classes))
    model = model.to(device)
    batches = Batches(data, STEP, seed, device)
    _train(model, batches, setting.epochs, setting.lr, STEP)
    trained = _error(model, batches)
    cases = [(UNCONVERTED, STARTS[0])]
    cases += [(recipe, start) for recipe in setting.recipes for start in STARTS]
    for recipe, start in cases:
        changed = copy.deepcopy(model)
        if recipe != UNCONVERTED:
            _convert(changed, recipe, start, batches)
        converted, tuned = _error(changed, batches), {}
        for micro_batch in setting.micro_batches:
            again = copy.deepcopy(changed)
            order = Batches(data, STEP, 1000 + seed, device)
            _train(again, order, setting.tune_epochs, setting.tune_lr, micro_batch)
            tuned[micro_batch] = _error(again, batches)
        yield Result(seed, recipe, start, trained, converted, tuned)


def _convert(model: nn.Module, recipe: str, start: str, batches: Batches) -> None:
    with warnings.catch_warnings():
        # That a method needs a norm, or loses a scale, is what is being measured.
        warnings.simplefilter("ignore", fw.FilterwiseWarning)
        loader = None
        if start == STARTS[2]:
            loader = [x for x, _ in zip(batches.epoch(), range(LOADER_STEPS), strict=False)]
        keep = start != STARTS[0]
        fw.convert_(model, recipe, select=_is_convolution, preserve=keep, loader=loader)


def _is_convolution(name: str, module: nn.Module) -> bool:
    """Select every convolution of more than one weight a filter: the paper puts WA on all."""
    del name
    return isinstance(module, nn.Conv2d) and module.weight[0].numel() > 1


def _train(model: nn.Module, batches: Batches, epochs: int, lr: float, micro_batch: int) -> None:
    """Train with SGD and a cosine; weights are normalized once a step, whatever the micro-batch."""
    optimizer = torch.optim.SGD(fw.param_groups(model, DECAY), lr=lr, momentum=MOMENTUM)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, batches.steps * epochs)
    model.train()
    for _ in range(epochs):
        for pictures, labels in batches.epoch():
            if not _step(model, optimizer, pictures, labels, micro_batch):
                return
            schedule.step()


def _step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    pictures: Tensor,
    labels: Tensor,
    micro_batch: int,
) -> bool:
    """Take one optimizer step; False, and no step, where the loss is not finite."""
    optimizer.zero_grad()
    parts = list(zip(pictures.split(micro_batch), labels.split(micro_batch), strict=True))
    total = torch.zeros((), device=pictures.device)
    for index, (part, answers) in enumerate(parts, start=1):
        with fw.defer(model, enabled=index < len(parts)):
            loss = nn.functional.cross_entropy(model(part), answers, reduction="sum") / len(labels)
            loss.backward()
        total += loss.detach()
    if not bool(total.isfinite()):
        return False
    optimizer.step()
    return True


def _error(model: nn.Module, batches: Batches) -> float:
    """Return the share of test pictures answered wrongly; an answer that is not finite is wrong."""
    model.eval()
    wrong, count = 0, 0
    with torch.no_grad():
        for pictures, labels in batches.test():
            logits = model(pictures)
            right = (logits.argmax(1) == labels) & logits.isfinite().all(1)
            wrong, count = wrong + int((~right).sum()), count + len(labels)
    model.train()
    return wrong / count


def _spread(values: Sequence[float]) -> str:
    """Return median and quartiles in percent."""
    if len(values) < 2:
        return f"{100 * values[0]:.1f}"
    low, middle, high = statistics.quantiles([100 * one for one in values], method="inclusive")
    return f"{middle:.1f} ({low:.1f} to {high:.1f})"


def table(results: Sequence[Result], setting: Setting) -> tuple[list[str], list[list[str]]]:
    """Return headers and cells: medians and quartiles over seeds, test error in percent."""
    headers = ["recipe", "start", "after conversion"]
    headers += [f"tuned, micro-batch {size}" for size in setting.micro_batches]
    rows: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        rows.setdefault((result.recipe, result.start), []).append(result)
    cells = []
    for (recipe, start), group in rows.items():
        words = "(not converted)" if recipe == UNCONVERTED else start
        tuned = [_spread([one.tuned[size] for one in group]) for size in setting.micro_batches]
        cells.append([recipe, words, _spread([one.converted for one in group]), *tuned])
    return headers, cells


def page(
    results: Sequence[Result], setting: Setting, data: PictureSet, command: str, note: str = ""
) -> str:
    """Return the table and how it was made as Markdown; `note` is on the data."""
    headers, cells = table(results, setting)
    seeds = len({result.seed for result in results})
    place, used = hardware(torch.device(setting.device)), versions()
    lines = [
        f"# Converting a trained BatchNorm network: {Path(data.name).name}",
        "",
        f"Test error in percent, median (and quartiles) of {seeds} seeds, each with its own first"
        " weights and order of pictures.",
        "",
        f"| {' | '.join(headers)} |",
        f"|{' --- |' * len(headers)}",
        *(f"| {' | '.join(row)} |" for row in cells),
        "",
        f"- Command: `{command}`",
        f"- Data: {data.origin.replace(data.name, Path(data.name).name)};"
        f" {len(data.train_labels)} pictures to train, {len(data.test_labels)} to test."
        + (f" {note}" if note else ""),
        f"- Network: `{setting.net}`, {setting.epochs} epochs at {setting.lr:g}, then"
        f" {setting.tune_epochs} epochs of fine-tuning at {setting.tune_lr:g} (a cosine each, SGD,"
        f" momentum {MOMENTUM:g}, decay {DECAY:g}, {STEP} pictures an optimizer step, in"
        " micro-batches of the number in the column).",
        f"- Starts: as `convert_` does by itself; with `preserve=True`; with a loader of"
        f" {LOADER_STEPS} batches of {STEP} training pictures too. Every convolution is selected"
        " (`select=`), also those of a fan-in below 16, which by default are left alone.",
        f"- Ran on: {place['processor']}, {place['threads']} thread(s), {place['device']}; "
        + ", ".join(f"{name} {number}" for name, number in used.items() if name != "timm")
        + ".",
    ]
    return "\n".join(lines) + "\n"


def _line(result: Result, setting: Setting, data: PictureSet) -> str:
    record: dict[str, Any] = asdict(result)
    record["setting"] = asdict(setting)
    record["data"] = {"name": Path(data.name).name, "sha256": data.sha256}
    record["versions"] = versions()
    return json.dumps(record)


def _options() -> argparse.ArgumentParser:
    usual = Setting()
    parser = argparse.ArgumentParser(
        prog="python -m filterwise.lab.fine_tune",
        description="What a trained BatchNorm network keeps when it is converted.",
        epilog="Example: python -m filterwise.lab.fine_tune --seeds 1 --out runs/fine_tune",
    )
    add = parser.add_argument
    add("--data", default="digits", help="digits, a torchvision name, or a class-folder tree")
    add("--root", default="data", help="folder in which torchvision's sets lie")
    add("--note", default="", help="a sentence on the data, for the page")
    add("--limit", type=int, help="train on so many pictures, the first of each class")
    add("--out", type=Path, default=Path("runs/fine_tune"), help="folder of the results")
    add("--seeds", type=int, default=5, help="seeds 0, 1, ...")
    add("--net", default=usual.net, help="plain, residual, or a torchvision or timm name")
    add("--epochs", type=int, default=usual.epochs)
    add("--lr", type=float, default=usual.lr)
    add("--tune-epochs", type=int, default=usual.tune_epochs)
    add("--tune-lr", type=float, default=usual.tune_lr)
    add("--micro-batches", default="64,2", help="sizes, separated by commas")
    add("--recipes", default=",".join(RECIPES), help="separated by commas")
    add("--device", default=usual.device)
    return parser


def _limited(data: PictureSet, limit: int | None) -> PictureSet:
    if limit is None or limit >= len(data.train_labels):
        return data
    share = max(1, limit // len(data.classes))
    chosen = torch.cat(
        [torch.nonzero(data.train_labels == k).flatten()[:share] for k in range(len(data.classes))]
    ).sort()[0]
    return PictureSet(
        data.name,
        data.train_pictures[chosen].contiguous(),
        data.train_labels[chosen],
        data.test_pictures,
        data.test_labels,
        data.classes,
        f"{data.origin}; the first {share} of each class to train on",
    )


def _setting(given: argparse.Namespace) -> Setting:
    """Return the settings of a command line.

    Raises:
        ValueError: If a number is out of range or a recipe cannot be read.
    """
    sizes = tuple(int(size) for size in given.micro_batches.split(","))
    if min(given.seeds, given.epochs, given.tune_epochs, *sizes) < 1:
        raise ValueError("seeds, epochs and micro-batches must be 1 or more")
    recipes = tuple(str(fw.Recipe.parse(one)) for one in split_recipes(given.recipes))
    return Setting(
        given.net,
        given.epochs,
        given.lr,
        given.tune_epochs,
        given.tune_lr,
        sizes,
        recipes,
        given.device,
    )


def _run(given: argparse.Namespace, setting: Setting, command: str) -> list[Result]:
    """Run all seeds; after each the folder holds what is finished."""
    data = _limited(load(given.data, root=given.root), given.limit)
    given.out.mkdir(parents=True, exist_ok=True)
    be_deterministic(False)
    results: list[Result] = []
    for seed in range(given.seeds):
        for result in measure(data, setting, seed):
            results.append(result)
            print(f"seed {seed}  {result.recipe:<6} {result.start}", file=sys.stderr)
        lines = [_line(result, setting, data) for result in results]
        write_whole(given.out / "results.jsonl", ("\n".join(lines) + "\n").encode())
        text = page(results, setting, data, command, given.note)
        write_whole(given.out / "README.md", text.encode())
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = _options()
    given = parser.parse_args(arguments)
    words = sys.argv[1:] if arguments is None else arguments
    command = f"python -m filterwise.lab.fine_tune {shlex.join(words)}".rstrip()
    try:
        setting = _setting(given)
        results = _run(given, setting, command)
    except (UsageError, ValueError) as error:
        if isinstance(error, fw.ConversionError):
            print(f"fine_tune: {error}", file=sys.stderr)
            return 1
        parser.error(str(error))
    except (LabError, OSError) as error:
        print(f"fine_tune: {error}", file=sys.stderr)
        return 1
    print(text_table(*table(results, setting)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
