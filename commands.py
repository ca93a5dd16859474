"""The command line: `python commands.py VERB [key=value | --key value ...]`.

Fire owns the verbs; what follows the verb goes to a real @hydra.main function (Hydra's shell completion looks for that word here).
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

from image_classifier import __version__
from image_classifier.cli.options import exit_code, overview, summaries, verb_help
from image_classifier.errors import ConfigError
from image_classifier.paths import CONF_DIR
from image_classifier.text import did_you_mean

PROGRAM = "commands.py"
_OF_TRAIN = (
    "torch torchvision pytorch_lightning torchmetrics timm safetensors optuna sqlalchemy mlflow dvc "
    "onnx onnxscript scipy sklearn cleanlab matplotlib pyarrow"
)
_OF_SERVE = "fastapi uvicorn starlette pydantic python_multipart prometheus_client"
_OPTIONAL = dict.fromkeys(_OF_TRAIN.split(), "train") | dict.fromkeys(
    _OF_SERVE.split(), "serve"
)  # package -> the extra that brings it


class Commands:
    """A folder of images in, a classifier that can be trusted out."""

    def __init__(self, arguments: list[str]) -> None:
        self._arguments = arguments

    def prepare(self) -> None:
        """Find the images of a data set, check and split them, and write manifest.csv."""
        self._run("prepare", "image_classifier.cli.verbs.prepare:prepare")

    def audit(self) -> None:
        """Look at every image and say what is wrong with the data: copies, leaks, unreadable files."""
        self._run("audit", "image_classifier.cli.verbs.audit:audit")

    def show(self) -> None:
        """Write a sheet of augmented training images to look at."""
        self._run("show", "image_classifier.training.show:show")

    def baseline(self) -> None:
        """Judge what a model must beat: the most frequent class, and logistic regression on embeddings."""
        self._run("baseline", "image_classifier.training.baseline:baseline")

    def suspects(self) -> None:
        """Find the images that are probably labelled wrong, and propose what to do about each in fix.csv."""
        self._run("suspects", "image_classifier.cli.verbs.suspects:suspects")

    def train(self) -> None:
        """Train a classifier and leave a bundle in models/NAME/."""
        self._run("train", "image_classifier.training.run:train")

    def tune(self) -> None:
        """Search for the best settings: many trainings, pruned and resumable, on one machine or many."""
        self._run("tune", "image_classifier.cli.verbs.tune:tune")

    def test(self) -> None:
        """Measure a bundle or a checkpoint on images it never saw."""
        self._run("test", "image_classifier.cli.verbs.test:test")

    def report(self) -> None:
        """Write one page about a run, or say whether the second of two is really better."""
        self._run("report", "image_classifier.cli.verbs.report:report")

    def export(self) -> None:
        """Write other forms of a bundle's model, each held against the checkpoint: sealed, int8, OpenVINO, TensorRT, Triton, MLflow."""
        self._run("export", "image_classifier.exporting.export:export")

    def verify(self) -> None:
        """Check a bundle: every file's hash, and the golden images on every backend."""
        self._run("verify", "image_classifier.inference.verify:verify")

    def promote(self) -> None:
        """Register a bundle in MLflow, after a last check, and let an alias point to it."""
        self._run("promote", "image_classifier.cli.verbs.promote:promote")

    def triton(self) -> None:
        """Start a Triton server over a bundle's model repository, wait until it really answers, and stop it."""
        self._run("triton", "image_classifier.cli.verbs.triton:triton")

    def infer(self) -> None:
        """Say what images show, with a bundle, a checkpoint or an ONNX file."""
        self._run("infer", "image_classifier.inference.infer:infer")

    def serve(self) -> None:
        """Put models behind HTTP: a web page, a REST API and the V2 protocol."""
        self._run("serve", "image_classifier.serving.settings:serve")

    def drift(self) -> None:
        """Say whether what a server was asked lately is still like what its model was validated on."""
        self._run("drift", "image_classifier.cli.verbs.drift:drift")

    def clean(self) -> None:
        """Remove what can be made again: decoded pixels and what is known of files; images and models stay."""
        self._run("clean", "image_classifier.cli.verbs.clean:clean")

    def _run(self, verb: str, worker: str) -> None:
        if {"--help", "-h"} & set(self._arguments):
            print(verb_help(PROGRAM, verb, summaries(Commands)[verb], CONF_DIR))
        else:
            from image_classifier.cli.hydra_app import run_verb

            run_verb(verb, self._arguments, _imported(worker))


def _imported(worker: str) -> Callable[[Any], object]:
    """A task that imports its worker when it runs, after the command line was found to be right."""

    def task(config: Any) -> object:
        module, _, function = worker.partition(":")
        try:
            return getattr(importlib.import_module(module), function)(config)
        except ModuleNotFoundError as error:
            if error.name not in _OPTIONAL:
                raise
            extra = f"pip install 'image-classifier[{_OPTIONAL[error.name]}]'"
            raise ConfigError(f"this needs the package {error.name}, which is not installed", extra) from error

    return task


def main() -> None:
    """Dispatch on the verb; Fire sees nothing else of the line."""
    verb, *arguments = sys.argv[1:] or ["--help"]
    verbs = summaries(Commands)
    if verb in ("--help", "-h", "help"):
        print(overview(PROGRAM, verbs))
    elif verb == "--version":
        print(f"image_classifier {__version__}")
    elif verb in ("-sc", "--shell-completion"):
        from image_classifier.cli.hydra_app import complete

        complete(arguments, list(verbs))
    elif verb not in verbs:
        hint = "write the verb first. " if "=" in verb or verb.startswith("-") else did_you_mean(verb, verbs)
        raise ConfigError(f"{verb!r} is not a verb", f"{hint}The verbs are {', '.join(verbs)}")
    else:
        import fire

        fire.Fire(Commands(arguments), command=[verb], name=PROGRAM)


def run() -> None:
    """The installed command `image-classifier`."""
    sys.exit(exit_code(main))


if __name__ == "__main__":
    run()
