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
from image_classifier.dataset.prepare import DataSettings
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
        backbone: Builds the network without its last layer; None: that of `bundle`.
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
    backbone: Node | None = None
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
    """

    run: RunSettings
    data: DataSettings
    audit: AuditSettings
    model: ModelConfig
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

    @property
    def views(self) -> int:
        """How many augmented views of each image the loss compares."""
        return int(self.loss.get("views") or 1)

    def build(self, node: Node | None, key: str) -> Any:
        """Build what a node describes, None for no node; `key` is where it stands in the configuration."""
        return instantiate(node, trusted=self.run.trusted_packages, key=key) if node else None

    def with_values(self, values: Mapping[str, Any]) -> TrainConfig:
        """Return the configuration with other values at these dotted keys; keys that refer to them follow."""
        return self.change(values)

    def with_model(self, model: ModelConfig) -> TrainConfig:
        """Return the configuration with the network of the bundle that the run starts from."""
        if model is self.model:
            return self
        names = ("name", "backbone", "head_dropout", "normalise")
        return self.with_values({f"model.{name}": getattr(model, name) for name in names})

    def to_dict(self) -> dict[str, Any]:
        """Return all keys as plain values."""
        return dict(self.plain)

    def flat(self) -> dict[str, Scalar]:
        """Return all keys as dotted ones without passwords, for logs and comparisons."""
        return flatten(without_passwords(self.plain))
