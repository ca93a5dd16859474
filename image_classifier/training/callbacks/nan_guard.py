"""A loss or a gradient that is not a finite number: the run ends before anything good is overwritten, or the step is skipped."""

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
from image_classifier.training.callbacks.checkpoints import last_checkpoint
from image_classifier.training.callbacks.exact_resume import batches_done_in_epoch, copied_metrics, set_metrics
from image_classifier.training.datamodule import ImageDataModule
from image_classifier.training.distributed import gather, is_rank_zero
from image_classifier.training.module import ClassifierModule

log = logging.getLogger(__name__)

_SHOWN = 3  # images of a bad batch that the message names; the file has all
_MOST_IN_A_ROW = 10


class NanGuard(Callback):
    """`stop` ends the run with TrainingError, `skip` undoes each bad step; ten in a row end the run too.

    With `stop` a processor looks at each loss before the weights are touched. Elsewhere each look would make it wait for the device, so the
    first bad step is remembered there and looked at now and then, and before each validation and checkpoint. Bad gradients show in the
    weights, one step later. With `skip` loss and gradients are looked at in every step; a bad one changes no weight, no average and no
    metric, and the buffers (batch norm's statistics) are put back.
    """

    def __init__(self, on_nan: str, directory: Path, every_n_steps: int = 50) -> None:
        """`directory` is the run's folder, for the list of a bad batch's images; ConfigError where `on_nan` is neither stop nor skip."""
        check_on_nan(on_nan)
        self.skips, self.directory, self.every_n_steps = on_nan == "skip", directory, every_n_steps
        self.skipped, self._in_a_row = 0, 0
        self._before: tuple[list[torch.Tensor], dict[str, dict[str, Any]]] = [], {}
        self._worst: torch.Tensor | None = (
            None  # skip: a loss of the batches since the last update, the bad one where there is one
        )
        self._first: torch.Tensor | None = (
            None  # stop, on the device: [batches that were seen before the first bad one, its loss]
        )

    @property
    def state_key(self) -> str:
        """Return the name under which checkpoints keep the state; older ones know the class by this name."""
        return "BadLoss"

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "in_a_row": self._in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skipped, self._in_a_row = state["skipped"], state["in_a_row"]

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.skips and batches_done_in_epoch(trainer) % trainer.accumulate_grad_batches == 0:
            self._worst = None
            self._before = [buffer.clone() for buffer in pl_module.buffers()], copied_metrics(pl_module)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: torch.Tensor) -> None:
        loss = loss.detach().float() * trainer.accumulate_grad_batches
        if self.skips:
            self._worst = loss if self._worst is None else torch.where(torch.isfinite(self._worst), loss, self._worst)
        elif loss.device.type == "cpu":
            if not torch.isfinite(loss):
                self._stop(trainer, pl_module, float(loss), trainer.fit_loop.total_batch_idx)
        else:
            here = torch.stack([torch.full_like(loss, trainer.fit_loop.total_batch_idx), loss])
            self._first = (
                here if self._first is None else torch.where(torch.isfinite(self._first[1]), here, self._first)
            )

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if not self.skips:
            return
        gradients = (parameter.grad for group in optimizer.param_groups for parameter in group["params"])
        loss = float(self._worst if self._worst is not None else 0.0)
        if all(gather(torch.isfinite(torch.tensor(loss)).item() and are_finite(gradients))):
            self._in_a_row = 0
        else:
            self._skip(trainer, pl_module, optimizer, loss)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx % self.every_n_steps == 0:
            self._look(trainer, pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._look(trainer, pl_module, weights=True)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._look(trainer, pl_module, weights=True)  # a broken network must not replace a good one

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.skipped:
            log.warning(
                "%d of %d steps were skipped, as their loss or gradients were not finite",
                self.skipped,
                trainer.global_step,
            )

    def _look(self, trainer: pl.Trainer, pl_module: pl.LightningModule, weights: bool = False) -> None:
        if self._first is not None and not torch.isfinite(self._first[1]):
            self._stop(trainer, pl_module, float(self._first[1]), int(self._first[0]))
        if weights and not all(gather(are_finite(pl_module.parameters()))):
            self._stop(trainer, pl_module, None, trainer.fit_loop.total_batch_idx)

    def _skip(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer, loss: float
    ) -> None:
        """Leave this step out: an optimizer passes over parameters without a gradient."""
        optimizer.zero_grad(set_to_none=True)
        buffers, metrics = self._before
        with torch.no_grad():
            for buffer, before in zip(pl_module.buffers(), buffers, strict=True):
                buffer.copy_(before)
        set_metrics(pl_module, metrics)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, WeightAveraging):
                callback._latest_update_step = trainer.global_step + 1
        self.skipped, self._in_a_row = self.skipped + 1, self._in_a_row + 1
        where = f"step {trainer.global_step + 1} (epoch {trainer.current_epoch + 1})"
        log.warning(
            "%s is skipped: the loss is %g, or a gradient is not finite; batch: %s",
            where,
            loss,
            self._shown(trainer, self._paths(trainer)),
        )
        if self._in_a_row >= _MOST_IN_A_ROW:
            self._stop(
                trainer,
                pl_module,
                loss,
                trainer.fit_loop.total_batch_idx,
                f"{self._in_a_row} steps in a row were skipped, and ",
            )

    def _stop(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: float | None, batch: int, before: str = ""
    ) -> None:
        """Raise TrainingError about the training batch of that number, over all epochs, from 0; without a loss its gradients were bad."""
        back = trainer.fit_loop.total_batch_idx - batch
        step = trainer.global_step + 1 - back // trainer.accumulate_grad_batches - (loss is None)
        broken = loss is not None and back == 0 and not are_finite(pl_module.parameters())
        paths = self._paths(trainer, back + broken)
        rate = cast(ClassifierModule, pl_module).learning_rate
        what = (
            "the weights of the network became infinite or not a number"
            if loss is None
            else f"the loss became {loss:g}"
        )
        why = " from the gradients of the step before" if broken else ""
        last = last_checkpoint(trainer)
        good = (
            f"the last good checkpoint is {last.newest}; start a new run from it with model.from={last.newest}"
            if last and last.newest
            else "no checkpoint was written yet"
        )
        raise TrainingError(
            f"{before}{what}{why} at epoch {trainer.current_epoch + 1}, step {step}, learning rate {rate:g}; batch: {self._shown(trainer, paths)}",
            f"lower optimizer.lr, or set trainer.gradient_clip_val=1.0 or trainer.on_nan=skip; {good}",
        )

    def _paths(self, trainer: pl.Trainer, back: int = 0) -> list[str]:
        """The images of the batches since the last update but `back` batches, as far as they are of this epoch."""
        module = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(module, ImageDataModule):
            return []
        first = trainer.fit_loop.batch_idx - back
        first -= first % trainer.accumulate_grad_batches
        batches = range(max(0, first), max(0, first) + trainer.accumulate_grad_batches)
        return [path for batch in batches for path in module.paths_of(trainer.current_epoch, batch)]

    def _shown(self, trainer: pl.Trainer, paths: list[str]) -> str:
        """Some of the paths; all are written into the run folder."""
        if not paths:
            return "unknown"
        file = self.directory / f"bad_batch_step_{trainer.global_step + 1}.txt"
        if is_rank_zero():
            write_text(file, "\n".join(paths) + "\n")
        more = f" and {len(paths) - _SHOWN} more, all in {file}" if len(paths) > _SHOWN else f", listed in {file}"
        return ", ".join(paths[:_SHOWN]) + more


def check_on_nan(on_nan: Any) -> None:
    """Refuse what `trainer.on_nan` cannot be with a ConfigError."""
    if on_nan not in ("stop", "skip"):
        raise ConfigError(f"trainer.on_nan={on_nan} is unknown", "use stop or skip")


def are_finite(tensors: Iterable[torch.Tensor | None]) -> bool:
    """Whether all numbers are finite, of sharded tensors those of this rank; one pass over them."""
    found = [tensor.detach() for tensor in tensors if tensor is not None]
    found = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in found]
    return not found or all(bool(torch.isfinite(norms).all()) for norms in _norms_by_device(found))


def _norms_by_device(tensors: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The sums of absolute values, which are finite where all numbers are."""
    for device in {tensor.device for tensor in tensors}:
        here = [tensor for tensor in tensors if tensor.device == device and tensor.numel()]
        yield torch.stack([norm.float() for norm in torch._foreach_norm(here, 1.0)]) if here else torch.zeros(1)
