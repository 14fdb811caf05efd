"""Every knob of a run, in one place and checked."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, field_validator, model_validator

from filterwise.lab.checking import checked_values
from filterwise.lab.settings import Frozen
from filterwise.lab.training.options import ClassificationOptions, TaskOptions, of_the_task
from filterwise.lab.training.schedules import Constant, Schedule
from filterwise.recipe import Recipe

__all__ = [
    "Augmentation",
    "DataSettings",
    "Execution",
    "Mixing",
    "ModelSettings",
    "NormSettings",
    "Optimization",
    "TrainingSettings",
    "checked_training",
]

Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
Probability = Annotated[float, Field(ge=0, le=1)]
Initialization = Literal[
    "own", "kaiming", "balanced", "fixup", "skipinit", "branch", "data", "unit-gains"
]


class Augmentation(Frozen):
    """How training pictures are changed, each by a draw of its own.

    Attributes:
        padding: Pixels added on each side before the crop.
        fill: What is padded with: ``zero`` (black) or the channels' ``mean``.
        crop: Side in pixels of what is cut out, in the middle when testing; None: the picture's.
        crop_probability: Of the crop; a picture without one is cut in the middle.
        random_resized: Cut a part of random area and shape and resize it, as on ImageNet; pictures
            are then read from disk as they are needed.
        flip: Probability of exchanging left and right.
        erasing: Probability of erasing a box (Zhong et al., arXiv 1708.04896).
    """

    padding: Annotated[int, Field(ge=0)] = 0
    fill: Literal["zero", "mean"] = "zero"
    crop: Count | None = None
    crop_probability: Probability = 1.0
    random_resized: bool = False
    flip: Probability = 0.0
    erasing: Probability = 0.0


class DataSettings(Frozen):
    """What is learned from.

    Attributes:
        name: One of `filterwise.lab.data.loading.NAMES`, ``imagenet``, or the absolute path of a
            class-folder tree or an ``.npz`` file.
        reading: ``live``: all of it on the device, pictures from folders as squares; ``streamed``:
            read from a class-folder tree as needed; ``auto``: streamed if it is ``imagenet`` or
            crops are resized.
        size: Side in pixels to which the shorter side of pictures from folders is brought.
        scaling: ``standardize``: each channel to mean 0 and deviation 1 over the training pictures;
            ``unit``: values from 0 to 1.
        train_samples: So many of the training pictures, drawn once for all seeds; None: all.
        test_samples: Likewise of the test pictures.
        skip_bad: Leave out entries that are faulty and count them; else they are refused.
    """

    name: str = "digits"
    reading: Literal["auto", "live", "streamed"] = "auto"
    size: Annotated[int, Field(ge=8, le=4096)] = 32
    scaling: Literal["standardize", "unit"] = "standardize"
    train_samples: Count | None = None
    test_samples: Count | None = None
    skip_bad: bool = False
    augmentation: Augmentation = Augmentation()

    @property
    def streamed(self) -> bool:
        """Whether pictures are read from disk as they are needed."""
        if self.reading == "auto":
            return self.name.lower() == "imagenet" or self.augmentation.random_resized
        return self.reading == "streamed"

    @model_validator(mode="after")
    def _crop_is_possible(self) -> DataSettings:
        if self.augmentation.random_resized and not self.streamed:
            raise ValueError("random_resized needs pictures as they are: reading: streamed")
        if self.streamed and self.augmentation.crop_probability < 1:
            raise ValueError("crop_probability below 1 needs reading: live")
        return self


class NormSettings(Frozen):
    """What becomes of the activation norms that a network has after its conversion.

    Attributes:
        kind: ``recipe``: they are what the recipe says; ``synchronized``: batch norms take their
            statistics over all processes; ``switchable``: each becomes a Switchable Normalization
            (Luo et al., arXiv 1806.10779).
        fraction: Batch norms take their statistics from the first so many of a micro-batch, as
            ``equinorm(fraction=0.25)`` does.
        momentum: Of running statistics, as torch counts it; None leaves it.
        eps: Of every norm; None leaves it.
        scale: Whether norms learn a factor beside their shift.
        interleaved: Group norms put channel c into group c mod groups, in place of neighbours.
    """

    kind: Literal["recipe", "synchronized", "switchable"] = "recipe"
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    momentum: Annotated[float, Field(gt=0, le=1)] | None = None
    eps: Rate | None = None
    scale: bool = True
    interleaved: bool = False

    @model_validator(mode="after")
    def _one_change(self) -> NormSettings:
        if self.fraction < 1 and self.kind != "recipe":
            raise ValueError(f"a fraction below 1 goes with kind: recipe, not {self.kind}")
        return self


class ModelSettings(Frozen):
    """What learns.

    Attributes:
        name: A network of the lab (`filterwise.lab.architectures`), of torchvision or of timm.
        width: Share of the planes that it has by its name.
        recipe: What it is converted by, in canonical text; ``keep`` leaves it as it is.
        select: Patterns of the layers that the method goes to, as `fw.convert_` takes them; None:
            its default, every convolution but the classifier.
        exclude: Patterns of the layers and norms that the recipe leaves alone.
        initialization: First weights: the network's ``own``, a scheme of `fw.initialize_` (for
            ``data`` from the first micro-batch), or ``unit-gains``: raw weights normal with
            deviation 0.05, gains 1 and biases 0, as for Weight Normalization without data.
        norms: What becomes of activation norms.
        start: Whose weights it starts from: the folder of a finished run, or a checkpoint file;
            a relative one lies in `Execution.runs`. A classifier for other classes is drawn anew.
        preserve: Keep what the network at the start computes, as near as the recipe can.
    """

    name: str = "plain"
    width: Annotated[float, Field(gt=0, le=1)] = 1.0
    recipe: str = "keep"
    select: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()
    initialization: Initialization = "own"
    norms: NormSettings = NormSettings()
    start: str | None = None
    preserve: bool = False

    @field_validator("recipe")
    @classmethod
    def _canonical(cls, text: str) -> str:
        return str(Recipe.parse(text))

    @model_validator(mode="after")
    def _fits_start(self) -> ModelSettings:
        if self.preserve and self.start is None:
            raise ValueError("preserve keeps the function of a trained network: name its start")
        if self.start is not None and self.initialization != "own":
            raise ValueError(
                f"initialization: {self.initialization} would draw over the weights of the start"
            )
        return self


class Mixing(Frozen):
    """Training on mixtures of pairs, of pictures or of what layers make of them.

    A mixture is ``share * x + (1 - share) * x[other]`` with another order of the micro-batch; the
    loss is the same mixture of the losses for both labels. One share is drawn a micro-batch, from
    Beta(alpha, alpha).

    Attributes:
        kind: ``mixup``: pictures are mixed (Zhang et al., arXiv 1710.09412); ``manifold``: at one
            of `places`, drawn for each micro-batch (Verma et al., arXiv 1806.05236).
        alpha: Of the Beta distribution.
        places: ``input``, and names of modules whose output is mixed; None: the input and the first
            two stages of a network of the lab or of a ResNet.
    """

    kind: Literal["none", "mixup", "manifold"] = "none"
    alpha: Rate = 1.0
    places: Annotated[tuple[str, ...], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _places_of_manifold(self) -> Mixing:
        if self.places is not None and self.kind != "manifold":
            raise ValueError(f"places are of kind: manifold, not of {self.kind}")
        return self


class Optimization(Frozen):
    """How it learns.

    Attributes:
        learning_rate: That the schedule's factors multiply.
        momentum: Of SGD; AdamW keeps its own.
        decay: ``weights``: no decay on gains, biases and norms; ``all-but-gains``: none on gains of
            converted layers; ``all``: on everything.
        step_size: Samples in one optimizer step, over all processes.
        micro_batch: Samples in one forward and backward pass of one process; None: all of its.
        ragged: What becomes of the samples left over at the end of an epoch: ``drop`` them or
            ``keep`` them as a shorter step.
        clip_norm: Largest norm of a step's gradient.
    """

    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: Rate = 0.1
    momentum: Share = 0.9
    nesterov: bool = False
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 5e-4
    decay: Literal["weights", "all-but-gains", "all"] = "weights"
    schedule: Schedule = Constant()
    epochs: Count = 1
    step_size: Count = 64
    micro_batch: Count | None = None
    ragged: Literal["drop", "keep"] = "drop"
    clip_norm: Rate | None = None


class Execution(Frozen):
    """Where and how it is run: nothing that is meant to decide what comes out.

    Attributes:
        device: ``cpu``, ``cuda``, ``cuda:1``, ...
        root: Folder in which data sets lie.
        runs: Folder in which a relative `ModelSettings.start` lies.
        start_command: What makes that start; shown where it is missing.
        download: Fetch a set that is not there.
        workers: Processes that read pictures from disk.
        compile: Whether the model goes through ``torch.compile``.
        channels_last: Whether pictures and weights lie in that order.
        checkpoint_seconds: Time from one checkpoint to the next, at most an epoch.
        checkpoint_steps: Write one after so many steps, too.
        loggers: Beside CSV and TensorBoard: ``mlflow``, ``wandb``.
    """

    device: str = "cpu"
    root: str = "data"
    runs: str = "."
    start_command: str | None = None
    download: bool = False
    workers: Annotated[int, Field(ge=0, le=256)] = 0
    compile: bool = False
    channels_last: bool = False
    checkpoint_seconds: Annotated[float, Field(ge=0)] = 60.0
    checkpoint_steps: Count | None = None
    loggers: tuple[Literal["mlflow", "wandb"], ...] = ()


class TrainingSettings(Frozen):
    """Everything about one training run.

    Attributes:
        task: A name of `filterwise.lab.tasks.TASKS`.
        mixing: Of pairs of samples.
        seed: Of first weights, order of samples and every other random draw.
        precision: Of forward and backward; weights are kept in float32 (float64 for ``64-true``).
        deterministic: Refuse operations that cannot be repeated to the bit.
        evaluate_every: Epochs from one evaluation to the next.
        options: What the task asks for beside the rest.
        execution: Not part of the run's identity.
    """

    task: str = "classification"
    data: DataSettings = DataSettings()
    model: ModelSettings = ModelSettings()
    optimization: Optimization = Optimization()
    mixing: Mixing = Mixing()
    seed: Annotated[int, Field(ge=0)] = 0
    precision: Literal["32-true", "64-true", "bf16-mixed"] = "32-true"
    deterministic: bool = False
    evaluate_every: Count = 1
    options: TaskOptions = ClassificationOptions()
    execution: Execution = Execution()

    @model_validator(mode="before")
    @classmethod
    def _options_of_the_task(cls, values: Any) -> Any:
        return of_the_task(values)

    @model_validator(mode="after")
    def _schedule_fits(self) -> TrainingSettings:
        schedule, epochs = self.optimization.schedule, self.optimization.epochs
        last = max(getattr(schedule, "milestones", (0.0,)))
        if last >= epochs:
            raise ValueError(
                f"the schedule's milestone {last:g} is never reached in {epochs} epochs"
            )
        return self

    @model_validator(mode="after")
    def _pairs(self) -> TrainingSettings:
        size = self.optimization.micro_batch or self.optimization.step_size
        if self.mixing.kind != "none" and size < 2:
            raise ValueError(f"{self.mixing.kind} needs pairs, and a micro-batch is one sample")
        return self

    @property
    def identity(self) -> str:
        """Sixteen hexadecimal digits of the SHA-256 of all settings but `execution`.

        Those that are as they are without being named do not count, so that a setting which a later
        version adds leaves the runs of earlier ones as they are.
        """
        fields = _named(self)
        fields.pop("execution", None)
        text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _named(model: BaseModel) -> dict[str, Any]:
    """Return what differs from the defaults, and the kind of whatever has kinds."""
    plain, found = model.model_dump(mode="json"), {}
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        if name != "kind" and value == field.get_default(call_default_factory=True):
            continue
        found[name] = _named(value) if isinstance(value, BaseModel) else plain[name]
    return found


def checked_training(values: dict[str, Any], where: str = "settings") -> TrainingSettings:
    """Return the settings that nested values mean.

    Args:
        values: As a recipe or a command line has them; ``options`` need not name their ``kind``,
            which is the task.
        where: What the message begins with: a file, say.

    Raises:
        UsageError: If a key is unknown (naming the nearest) or a value is out of range.
    """
    return checked_values(TrainingSettings, values, lambda _place: where)
