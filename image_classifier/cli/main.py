"""The table of verbs, and their dispatch: each verb's function is imported when it is called."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

from image_classifier import __version__
from image_classifier.cli.exit_codes import exit_code
from image_classifier.cli.help_pages import overview, verb_help
from image_classifier.cli.options import translate
from image_classifier.errors import ConfigError
from image_classifier.extras import missing_packages_named
from image_classifier.paths import CONF_DIR
from image_classifier.program import program
from image_classifier.text import did_you_mean

# Each verb, run by the function of its name in cli/verbs/VERB.py, and its line of help.
VERBS: dict[str, str] = {
    "prepare": "Find the images of a data set, check and split them, and write manifest.csv.",
    "audit": "Check every image for problems: duplicates, leaks between splits, unreadable files.",
    "show": "Write a sheet of augmented training images to look at.",
    "baseline": "Score what a model must beat: the most frequent class, and logistic regression on embeddings.",
    "suspects": "Find the images that are probably labelled wrong, and propose a correction for each in fix.csv.",
    "train": "Train a classifier and write a bundle to models/NAME/.",
    "tune": "Search for the best settings: many trainings, pruned and resumable, on one machine or many.",
    "test": "Score a bundle or a checkpoint on images it was not trained on.",
    "report": "Write one page about a run, or compare two runs and tell whether the second is really better.",
    "export": "Convert a bundle's model (sealed, int8, OpenVINO, TensorRT, Triton, MLflow) and compare the answers.",
    "verify": "Check a bundle: every file's hash, and the golden images on every backend.",
    "promote": "Register a bundle in MLflow, after a last check, and point an alias to it.",
    "triton": "Start a Triton server on a bundle's model repository, wait until it answers, and stop it.",
    "infer": "Classify images with a bundle, a checkpoint or an ONNX file.",
    "serve": "Serve models over HTTP: a web page, a REST API and the V2 protocol.",
    "drift": "Compare the images that a server classified lately with the validation images of its model.",
    "clean": "Remove caches that can be rebuilt: decoded pixels and image metadata. Images and models stay.",
}

# Words for these verbs in other programs, for "did you mean".
_OTHER_NAMES = {"predict": "infer", "classify": "infer", "evaluate": "test", "eval": "test", "fit": "train"}


def main() -> None:
    """Dispatch on the verb; Fire sees nothing else of the line.

    Raises:
        ConfigError: The first word is no verb.
    """
    verb, *arguments = sys.argv[1:] or ["--help"]
    if verb in ("--help", "-h", "help"):
        print(overview(program(), VERBS))
    elif verb == "--version":
        print(f"image_classifier {__version__}")
    elif {verb, *arguments} & {"-sc", "--shell-completion"}:
        from image_classifier.cli.completion import complete

        complete(arguments, [verb] if verb in VERBS else list(VERBS))
    elif verb not in VERBS:
        raise _unknown(verb)
    elif {"--help", "-h"} & set(arguments):
        print(verb_help(program(), verb, VERBS[verb], CONF_DIR))
    else:
        import fire

        # Fire takes a function, not a functools.partial, which is a method descriptor from Python 3.14 on.
        fire.Fire({verb: lambda: _run(verb, arguments)}, command=[verb], name=program())


def run() -> None:
    """Run the command line and exit with its code."""
    sys.exit(exit_code(main))


def _unknown(verb: str) -> ConfigError:
    hint = (
        "write the verb first. "
        if "=" in verb or verb.startswith("-")
        else did_you_mean(_OTHER_NAMES.get(verb, verb), VERBS)
    )
    return ConfigError(f"{verb!r} is not a verb", f"{hint}The verbs are {', '.join(VERBS)}")


def _run(verb: str, arguments: list[str]) -> None:
    from image_classifier.cli.hydra_app import run_verb

    if verb == "train" and chooses_by_images(arguments):
        importlib.import_module("image_classifier.cli.verbs.train").print_settled(arguments)
    else:
        run_verb(verb, arguments, _imported(verb))


def chooses_by_images(arguments: list[str]) -> bool:
    """Return whether a line of `train` asks for the settings of a run that chooses them by the images."""
    line = translate("train", arguments)
    return line.value("--cfg") == "job" and "model=auto" in line.overrides and not line.has("--multirun")


def _imported(verb: str) -> Callable[[Any], object]:
    """Return a task that imports its function when it runs, after the command line was checked."""

    def task(config: Any) -> object:
        with missing_packages_named():
            module = importlib.import_module(f"image_classifier.cli.verbs.{verb}")
            return getattr(module, verb)(config)

    return task
