"""Guard against losses and gradients that are not finite: stop before a good checkpoint is lost, or skip the step."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, WeightAveraging
from torch.distributed.tensor import DTensor

from image_classifier.atomic_io import write_text
from image_classifier.errors import ConfigError, TrainingError
from image_classifier.text import listed
from image_classifier.training.callbacks.checkpoints import last_checkpoint
from image_classifier.training.callbacks.exact_resume import batches_done_in_epoch, copied_metrics, set_metrics
from image_classifier.training.datamodule import ImageDataModule
from image_classifier.training.distributed import gather, is_rank_zero
from image_classifier.training.lightning_compat import callbacks_of, datamodule_of, skip_average_update
from image_classifier.training.module import ClassifierModule

log = logging.getLogger(__name__)

_MAX_SHOWN = 3  # images of a bad batch that the message names; the file lists all
_MAX_SKIPS_IN_A_ROW = 10


class NanGuard(Callback):
    """Checks that losses, gradients and weights are finite.

    `stop` ends the run with TrainingError. On the CPU each loss is checked before the weights change. On other devices
    a check would wait for the device, so the first bad step is only recorded there, and looked up now and then and
    before each validation and checkpoint. Bad gradients show in the weights, one step later.

    `skip` checks loss and gradients in every step. A bad step changes no weight, average or metric, and the buffers
    (statistics of batch norms) are restored. Ten bad steps in a row end the run.
    """

    def __init__(self, on_nan: str, directory: Path, every_n_steps: int = 50) -> None:
        """Set up the guard.

        Args:
            on_nan: stop or skip.
            directory: The run folder, for the list of a bad batch's images.
            every_n_steps: How often `stop` looks at the recorded bad step of a device.

        Raises:
            ConfigError: `on_nan` is neither stop nor skip.
        """
        check_on_nan(on_nan)
        self.skips = on_nan == "skip"
        self.directory = directory
        self.every_n_steps = every_n_steps
        self.skipped = 0
        self._skips_in_a_row = 0
        # skip: buffers and metrics before the batches of the next optimizer step
        self._buffers_before: list[torch.Tensor] = []
        self._metrics_before: dict[str, dict[str, Any]] = {}
        # skip: a loss of the batches since the last optimizer step, the bad one where there is one
        self._worst_loss: torch.Tensor | None = None
        # stop, on a device: float [2], number of batches before the first bad one and its loss
        self._first_bad: torch.Tensor | None = None

    @property
    def state_key(self) -> str:
        """The name of the state in checkpoints, which is the class's old name."""
        return "BadLoss"

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "in_a_row": self._skips_in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skipped = state["skipped"]
        self._skips_in_a_row = state["in_a_row"]

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # The first batch after an optimizer step: remember what a skipped step must restore.
        if self.skips and batches_done_in_epoch(trainer) % trainer.accumulate_grad_batches == 0:
            self._worst_loss = None
            self._buffers_before = [buffer.clone() for buffer in pl_module.buffers()]
            self._metrics_before = copied_metrics(pl_module)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: torch.Tensor) -> None:
        # Lightning has divided the loss by the number of accumulated batches.
        loss = loss.detach().float() * trainer.accumulate_grad_batches
        if self.skips:
            worst = self._worst_loss
            self._worst_loss = loss if worst is None else torch.where(torch.isfinite(worst), loss, worst)
        elif loss.device.type == "cpu":
            if not torch.isfinite(loss):
                self._stop(trainer, pl_module, float(loss), trainer.fit_loop.total_batch_idx)
        else:
            # No `if` on the loss: it would wait for the device. A bad entry stays, a good one is replaced.
            entry = torch.stack([torch.full_like(loss, trainer.fit_loop.total_batch_idx), loss])
            first = self._first_bad
            self._first_bad = entry if first is None else torch.where(torch.isfinite(first[1]), entry, first)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if not self.skips:
            return
        gradients = (parameter.grad for group in optimizer.param_groups for parameter in group["params"])
        loss = float(self._worst_loss if self._worst_loss is not None else 0.0)
        is_good = torch.isfinite(torch.tensor(loss)).item() and are_finite(gradients)
        # All ranks skip a step together.
        if all(gather(is_good)):
            self._skips_in_a_row = 0
        else:
            self._skip(trainer, pl_module, optimizer, loss)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx % self.every_n_steps == 0:
            self._check(trainer, pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._check(trainer, pl_module, weights=True)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._check(trainer, pl_module, weights=True)  # a broken network must not replace a good one

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.skipped:
            log.warning(
                "%d of %d steps were skipped because their loss or gradients were not finite",
                self.skipped,
                trainer.global_step,
            )

    def _check(self, trainer: pl.Trainer, pl_module: pl.LightningModule, weights: bool = False) -> None:
        """Stop the run where a bad step was recorded or, with `weights`, where a weight is not finite."""
        if self._first_bad is not None and not torch.isfinite(self._first_bad[1]):
            self._stop(trainer, pl_module, float(self._first_bad[1]), int(self._first_bad[0]))
        if weights and not all(gather(are_finite(pl_module.parameters()))):
            self._stop(trainer, pl_module, None, trainer.fit_loop.total_batch_idx)

    def _skip(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer, loss: float
    ) -> None:
        """Undo what the batches since the last optimizer step have changed."""
        # An optimizer ignores parameters without a gradient.
        optimizer.zero_grad(set_to_none=True)
        # The forward pass has updated statistics of batch norms and the metrics.
        with torch.no_grad():
            for buffer, before in zip(pl_module.buffers(), self._buffers_before, strict=True):
                buffer.copy_(before)
        set_metrics(pl_module, self._metrics_before)
        # Averaged weights count an optimizer step by its number.
        for callback in callbacks_of(trainer, WeightAveraging):
            skip_average_update(callback, trainer.global_step + 1)
        self.skipped += 1
        self._skips_in_a_row += 1
        log.warning(
            "step %d (epoch %d) is skipped: the loss is %g, or a gradient is not finite; batch: %s",
            trainer.global_step + 1,
            trainer.current_epoch + 1,
            loss,
            self._shown(trainer, self._paths(trainer)),
        )
        if self._skips_in_a_row >= _MAX_SKIPS_IN_A_ROW:
            prefix = f"{self._skips_in_a_row} steps in a row were skipped, and "
            self._stop(trainer, pl_module, loss, trainer.fit_loop.total_batch_idx, prefix)

    def _stop(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: float | None, batch: int, prefix: str = ""
    ) -> None:
        """Raise TrainingError about a training batch, by its number from 0 over all epochs; no loss: bad weights."""
        batches_back = trainer.fit_loop.total_batch_idx - batch
        # The step of that batch; bad weights come from the step before the one that noticed them.
        step = trainer.global_step + 1 - batches_back // trainer.accumulate_grad_batches - (loss is None)
        # The newest loss is bad and so are the weights: the gradients of the batch before have broken them.
        weights_were_bad = loss is not None and batches_back == 0 and not are_finite(pl_module.parameters())
        paths = self._paths(trainer, batches_back + weights_were_bad)
        if loss is None:
            what = "the weights of the network became infinite or not a number"
        else:
            what = f"the loss became {loss:g}"
        source = " from the gradients of the step before" if weights_were_bad else ""
        rate = cast(ClassifierModule, pl_module).learning_rate
        where = f"epoch {trainer.current_epoch + 1}, step {step}, learning rate {rate:g}"
        raise TrainingError(
            f"{prefix}{what}{source} at {where}; batch: {self._shown(trainer, paths)}",
            "lower optimizer.lr, or set trainer.gradient_clip_val=1.0 or trainer.on_nan=skip; "
            f"{_last_good_checkpoint(trainer)}",
        )

    def _paths(self, trainer: pl.Trainer, batches_back: int = 0) -> list[str]:
        """Return the images of one optimizer step's batches, so many batches ago, as far as they are of this epoch."""
        datamodule = datamodule_of(trainer)
        if not isinstance(datamodule, ImageDataModule):
            return []
        first = trainer.fit_loop.batch_idx - batches_back
        first -= first % trainer.accumulate_grad_batches
        batches = range(max(0, first), max(0, first) + trainer.accumulate_grad_batches)
        return [path for batch in batches for path in datamodule.paths_of(trainer.current_epoch, batch)]

    def _shown(self, trainer: pl.Trainer, paths: list[str]) -> str:
        """Write all paths into the run folder; return a text with some of them and the file."""
        if not paths:
            return "unknown"
        file = self.directory / f"bad_batch_step_{trainer.global_step + 1}.txt"
        if is_rank_zero():
            write_text(file, "\n".join(paths) + "\n")
        return f"{listed(paths, _MAX_SHOWN)}, listed in {file}"


def _last_good_checkpoint(trainer: pl.Trainer) -> str:
    last = last_checkpoint(trainer)
    if not last or not last.newest:
        return "no checkpoint was written yet"
    return f"the last good checkpoint is {last.newest}; start a new run from it with model.from={last.newest}"


def check_on_nan(on_nan: Any) -> None:
    """Check the value of `trainer.on_nan`.

    Raises:
        ConfigError: It is neither stop nor skip.
    """
    if on_nan not in ("stop", "skip"):
        raise ConfigError(f"invalid trainer.on_nan={on_nan}", "use stop or skip")


def are_finite(tensors: Iterable[torch.Tensor | None]) -> bool:
    """Return whether all numbers are finite, of sharded tensors those of this rank; None entries do not count.

    Examples:
        >>> are_finite([torch.ones(2), None])
        True
        >>> are_finite([torch.tensor([1.0, float("nan")])])
        False
    """
    given = [tensor.detach() for tensor in tensors if tensor is not None]
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in given]
    return not local or all(bool(torch.isfinite(norms).all()) for norms in _norms_by_device(local))


def _norms_by_device(tensors: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Yield the sums of absolute values, one a tensor, which are finite where all numbers are."""
    for device in {tensor.device for tensor in tensors}:
        here = [tensor for tensor in tensors if tensor.device == device and tensor.numel()]
        yield torch.stack([norm.float() for norm in torch._foreach_norm(here, 1.0)]) if here else torch.zeros(1)
