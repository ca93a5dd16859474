"""The configuration of a training: one frozen value, built once by the command line and never changed.

Choices from an open set (networks, losses, optimizers, augmentations, callbacks, loggers) stay a `Node`, which
`image_classifier.instantiate` builds. A value that a run finds by trying, such as a learning rate, gives a new
`TrainConfig`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from image_classifier.dataset.audit.issues import AuditSettings
from image_classifier.dataset.settings import NO_WEIGHTS, DataSettings
from image_classifier.errors import ConfigError
from image_classifier.evaluation.reliability.abstention import DecisionSettings
from image_classifier.instantiate import instantiate
from image_classifier.mappings import Scalar, flatten, without_passwords
from image_classifier.training.diagnostics import DiagnosticsSettings
from image_classifier.training.hardware import SpeedSettings
from image_classifier.training.run_dir import RunSettings

Node = Mapping[str, Any]  # plain: a `_target_` and its arguments
AUTO = "auto"


@dataclass(frozen=True)
class ModelConfig:
    """The section `model`: the network and the weights that it starts from.

    Attributes:
        name: For names of runs and reports.
        backbone: The node that builds the network without its last layer; None: that of `bundle`; auto: chosen by the
            images and by what weights can be had.
        head_dropout: Dropout in front of the last layer.
        normalise: auto, dataset, backbone, or {mean: [...], std: [...]}.
        weights: A file of weights to start from.
        bundle: A bundle or checkpoint to start from (the key `model.from`).
        freeze: What is not trained: "backbone", or beginnings of parameter names.
        teacher: A bundle to distil into the network.
        teacher_weight: Share of the teacher's loss, above 0 to 1; the rest is the loss of the labels.
        teacher_temperature: Softens the probabilities of teacher and student, above 0.
        unlabelled: A folder or a table of images without labels, or a list of them, for the teacher's loss only.
        tta: Test-time augmentation.
        models_dir: Where the bundle is looked for.
        trusted_packages: The user's own packages that a `_target_` may name.
    """

    name: str | None = None
    backbone: Any = None
    head_dropout: float = 0.0
    normalise: Any = AUTO
    weights: str | None = None
    bundle: str | None = None
    freeze: Any = None
    teacher: str | None = None
    teacher_weight: float = 0.9
    teacher_temperature: float = 2.0
    unlabelled: Any = None
    tta: str = "none"
    models_dir: str = "models"
    trusted_packages: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name, highest in (("teacher_weight", 1.0), ("teacher_temperature", 1000.0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= highest:
                raise ConfigError(f"model.{name} must be above 0 and at most {highest:g}, got {value!r}")
        if self.unlabelled and not self.teacher:
            raise ConfigError("model.unlabelled needs a teacher, which says what is in them", "give model.teacher=NAME")


def has_own_preprocessing(backbone: Node | None, weights: Any, bundle: Any) -> bool:
    """Return whether a network starts from weights that were trained with a size and a crop of their own."""
    node = backbone or {}
    return bool(bundle or ((weights or node.get("pretrained") or node.get("weights")) and "image_size" not in node))


@dataclass(frozen=True)
class FinetuneSettings:
    """The section `finetune`: how a run goes about the pretrained weights that it starts from.

    Attributes:
        probe: Whether the head starts as logistic regression on the frozen backbone's embeddings; that model is
            delivered where training does not beat it on val.
        refit: Whether the delivered model is fitted again to train and val together: a probe anew, with val scores that
            are out of fold; a network for half as many epochs more, with the val scores it had before.
        interpolate: Shares of the way from the probe's weights to the trained ones at which a model is tried too.
        keep_norm_stats: Whether batch normalisation keeps the mean and variance of the pretrained weights.
        views: How many augmented views of each image are kept as activations below the trained layers; null: none,
            every view is computed anew.
        cut: The layer below which activations are kept; null: found by measuring.
        cost: How much work a cut may make, in epochs of training all layers.
        max_gb: Limit of the kept activations on the disk, GB.
    """

    probe: bool = False
    refit: bool = False
    interpolate: list[float] = field(default_factory=list)
    keep_norm_stats: bool = False
    views: int | None = None
    cut: str | None = None
    cost: float = 4.0
    max_gb: float = 8.0

    def __post_init__(self) -> None:
        if not all(0 < share < 1 for share in self.interpolate):
            raise ConfigError(f"finetune.interpolate={self.interpolate} must be between 0 and 1", "such as [0.5,0.75]")
        if self.interpolate and not self.probe:
            raise ConfigError("finetune.interpolate needs finetune.probe=true, whose weights it starts from")
        if self.views is not None and self.views < 1:
            raise ConfigError(f"finetune.views must be 1 or more, or null, not {self.views}")


@dataclass(frozen=True)
class OptimizerConfig:
    """The section `optimizer`: the node of a factory, its learning rate (a number or auto), and its layer decay."""

    node: Node
    lr: Any = None
    layer_decay: float = 1.0


@dataclass(frozen=True)
class SchedulerConfig:
    """The section `scheduler`: the node of a factory (None: a constant rate), and when it moves the rate."""

    build: Node | None = None
    interval: str = "epoch"
    length: str | None = None
    monitor: str | None = None
    warmup: float = 0.0


@dataclass(frozen=True)
class TrainerConfig:
    """The section `trainer`: the node of Lightning's Trainer, our own keys, and Lightning's keys that we read too."""

    node: Node = field(default_factory=dict)
    speed: SpeedSettings = field(default_factory=SpeedSettings)
    on_nan: str = "stop"
    max_epochs: int | None = None
    max_steps: int | None = -1
    max_time: Any = None
    accelerator: str = AUTO
    devices: Any = 1
    num_nodes: int = 1
    strategy: Any = None
    sync_batchnorm: Any = False
    accumulate_grad_batches: int | None = 1
    check_val_every_n_epoch: int | None = 1

    def __post_init__(self) -> None:
        for name in ("max_epochs", "max_steps", "num_nodes", "accumulate_grad_batches", "check_val_every_n_epoch"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise ConfigError(f"trainer.{name} must be an int or null, got {value!r}")

    @property
    def has_max_steps(self) -> bool:
        """Whether a number of optimizer steps ends the run."""
        return (self.max_steps or -1) >= 0


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a training.

    Attributes:
        run: The keys at the root.
        data: Which images.
        audit: How they are audited.
        model: The network.
        finetune: How pretrained weights are used.
        loss: Builds the loss.
        optimizer: Builds the optimizer.
        scheduler: Builds the learning rate scheduler.
        augment: Builds the augmentation; None: there is none.
        trainer: Builds Lightning's Trainer.
        callbacks: Callbacks by name.
        loggers: Loggers by their key in the configuration.
        decision: When the finished model abstains.
        diagnostics: What is measured of the finished model.
        plain: All keys as plain resolved values, as they are saved and compared.
        yaml: The same as text, as config.yaml keeps it, without passwords.
        change: Returns the configuration with other values at dotted keys.
        recompose: Returns the configuration of a recipe, a list of overrides, with the user's own choices on top.
    """

    run: RunSettings
    data: DataSettings
    audit: AuditSettings
    model: ModelConfig
    finetune: FinetuneSettings
    loss: Node
    optimizer: OptimizerConfig
    scheduler: SchedulerConfig
    augment: Node | None
    trainer: TrainerConfig
    callbacks: Mapping[str, Node]
    loggers: Mapping[str, Node]
    decision: DecisionSettings
    diagnostics: DiagnosticsSettings
    plain: Mapping[str, Any] = field(repr=False)
    yaml: str = field(repr=False)
    change: Callable[[Mapping[str, Any]], TrainConfig] = field(repr=False, compare=False)
    recompose: Callable[[Sequence[str]], TrainConfig] = field(repr=False, compare=False)

    @property
    def views(self) -> int:
        """How many augmented views of each image the loss compares."""
        return int(self.loss.get("views") or 1)

    def build(self, node: Node | None, key: str) -> Any:
        """Build what a node describes, None for no node; `key` is where it stands in the configuration."""
        return instantiate(node, trusted=self.run.trusted_packages, key=key) if node else None

    def with_values(self, values: Mapping[str, Any]) -> TrainConfig:
        """Return the configuration with other values at these dotted keys; keys that refer to them follow."""
        if "optimizer.lr" in values:
            # The configuration of a run that was killed before its rate was found has `auto` in place of the reference.
            build = self.scheduler.build or {}
            rates = {f"scheduler.build.{key}": values["optimizer.lr"] for key, value in build.items() if value == AUTO}
            values = {**rates, **values}
        return self.change(values)

    def with_model(self, model: ModelConfig) -> TrainConfig:
        """Return the configuration with the network of the bundle that the run starts from."""
        if model is self.model:
            return self
        names = ("name", "backbone", "head_dropout", "normalise")
        return self.with_values({f"model.{name}": getattr(model, name) for name in names})

    def with_preprocessing(self, found: Mapping[str, Any]) -> TrainConfig:
        """Return the configuration with what the pretrained weights want in place of each `auto` of its preprocessing.

        What is not known of them is as without weights.
        """
        wanted = {**NO_WEIGHTS, **found}
        values = {f"data.{name}": value for name, value in wanted.items() if getattr(self.data, name) == AUTO}
        return self.with_values(values) if values else self

    def to_dict(self) -> dict[str, Any]:
        """Return all keys as plain values."""
        return dict(self.plain)

    def flat(self) -> dict[str, Scalar]:
        """Return all keys as dotted ones without passwords, for logs and comparisons."""
        return flatten(without_passwords(self.plain))
