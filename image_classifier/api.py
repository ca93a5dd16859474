"""The Python API: train, load, predict, evaluate, explain, export and audit, in a script or a notebook.

It is a second front door beside the command line and takes the same settings, so that both give the same results.
"""

from __future__ import annotations

import glob
import io
import logging
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from PIL import Image

from image_classifier.bundle import INFO_NAME
from image_classifier.errors import ConfigError, UnreadableImage
from image_classifier.extras import missing_packages_named
from image_classifier.inference.explain_images import Explained, explainer_of, over_picture
from image_classifier.inference.load import load_predictor, pulled_checkpoint
from image_classifier.inference.predictor import Predictor
from image_classifier.notebook import AuditResult, ImageExplanation, ImagePrediction, ImagePredictions
from image_classifier.sources.archive import is_archive_name
from image_classifier.sources.image_source import Content, ImageSource
from image_classifier.sources.inputs import STDIN, Inputs
from image_classifier.sources.table import is_table
from image_classifier.text import listed

if TYPE_CHECKING:
    from image_classifier.exporting.export import ExportResult
    from image_classifier.inference.evaluate import EvaluationResult
    from image_classifier.training.run import TrainResult

# A file, an address, the bytes of a file, a PIL image, or RGB pixels uint8 [H, W, 3] (or grey [H, W]).
ImageLike: TypeAlias = "str | os.PathLike[str] | bytes | Image.Image | np.ndarray"

_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")  # of PIL images, which a PNG file keeps to the bit


def train(
    data: str | os.PathLike[str] | None = None, /, *, name: str | None = None, verbose: bool = True, **settings: Any
) -> TrainResult:
    """Train a classifier and write a bundle to models/NAME/, as the command `train` does.

    Args:
        data: A folder with one sub-folder per class or with train/, val/ and test/; a table, an archive or a URL;
            None: what the setting `data` chooses, such as `data="digits"`.
        name: Of the run and the bundle; None: made from data and model.
        verbose: Whether to show the progress on standard error.
        settings: Keys of conf/train.yaml; a mapping holds the keys of a group. `model="resnet18"` chooses from a
            config group, `trainer={"max_epochs": 3}` sets a key of one.

    Raises:
        ConfigError: A setting is unknown or invalid.
        DataError: The images cannot be found or trained on.
        TrainingError: The loss is not finite.
    """
    with missing_packages_named(), _logging_to_stderr(verbose):
        from image_classifier.cli.python_settings import train_overrides
        from image_classifier.cli.train_config import compose_train_config
        from image_classifier.training.cross_validation.all_folds import train as run_training

        return run_training(compose_train_config(train_overrides(data, name, settings)))


def audit(data: str | os.PathLike[str] | None = None, /, *, verbose: bool = True, **settings: Any) -> AuditResult:
    """Check every image of a data set for problems and write audit.html and exclude.csv; nothing is deleted.

    Args:
        data: As for `train`.
        verbose: Whether to show the progress on standard error.
        settings: Keys of conf/audit.yaml, as for `train`.

    Raises:
        ConfigError: A setting is unknown or invalid.
        DataError: The images cannot be found.
    """
    from image_classifier.cli.python_settings import audit_settings
    from image_classifier.dataset.run import audit_dataset

    with _logging_to_stderr(verbose):
        scan = audit_dataset(*audit_settings(data, settings))
    return AuditResult(
        scan.audit.issues, tuple(scan.audit.table()), scan.directory / "audit.html", scan.exclusions.path
    )


def load(
    name: str | os.PathLike[str],
    *,
    backend: str | None = None,
    models_dir: str | os.PathLike[str] = "models",
    batch_size: int = 64,
) -> Model:
    """Load a trained model; with an ONNX bundle, PyTorch is not needed.

    Args:
        name: A bundle by its name in `models_dir`, or the path of a bundle, a .ckpt or an .onnx file.
        backend: What computes, such as onnx, checkpoint, openvino or auto; None: onnx for a bundle.
        models_dir: Where bundles are.
        batch_size: Images in a batch.

    Raises:
        CheckpointError: There is no such model, or a file of it is damaged.
        ConfigError: The backend is unknown or not installed.
    """
    path = pulled_checkpoint(os.fspath(name), Path(models_dir))
    with missing_packages_named():
        return Model(path, load_predictor(path, backend, batch_size))


class Model:
    """A trained classifier.

    Args:
        path: The bundle or file.
        predictor: Computes its answers.
    """

    def __init__(self, path: Path, predictor: Predictor) -> None:
        self.path = path
        self.predictor = predictor

    def __repr__(self) -> str:
        return f"Model({str(self.path)!r}, {len(self.classes)} classes, backend {self.predictor.backend_name})"

    @property
    def name(self) -> str:
        """The name of the bundle or file."""
        return self.path.resolve().name

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, in the order of the probabilities."""
        return self.predictor.classes

    def predict(self, images: ImageLike | Iterable[ImageLike]) -> ImagePrediction | ImagePredictions:
        """Classify images.

        Args:
            images: One image (file, address, bytes, PIL image, pixels uint8 [H, W, 3]); or several: a list of these,
                a folder, a pattern such as ``photos/*.jpg``, an archive, or pixels uint8 [N, H, W, 3].

        Returns:
            One prediction for one image, else a list. An unreadable image in a list has an `error` in place of a label.

        Raises:
            UnreadableImage: The only image cannot be read.
            DataError: A folder or a pattern holds no image.
        """
        if not _is_one_image(images):
            return ImagePredictions(self.iter_predict(images))
        answers = ImagePredictions(self.iter_predict(images))
        if len(answers) > 1:  # an address of an archive or of a folder
            return answers
        if answers[0].error:
            raise UnreadableImage(answers[0].path, answers[0].error)
        return answers[0]

    def iter_predict(self, images: Any) -> Iterator[ImagePrediction]:
        """Yield the predictions one after the other, for more images than fit into memory; arguments as `predict`."""
        for prediction, content in self.predictor.answers(_image_sources(images), keep=True):
            yield ImagePrediction.of(prediction, content)

    def evaluate(self, test_dir: str | os.PathLike[str] | None = None, **settings: Any) -> EvaluationResult:
        """Compute the metrics on labelled images and write them with predictions and plots, as the command `test` does.

        Args:
            test_dir: A folder with one sub-folder per class; None: the test images that the training held out.
            settings: Other keys of conf/test.yaml, such as `split="val"` or `robustness=True`.

        Raises:
            DataError: There are no such images.
            UnreadableImage: One of them cannot be read.
        """
        from image_classifier.cli.python_settings import verb_settings
        from image_classifier.inference.evaluate import TestSettings, evaluate

        chosen = {"checkpoint_name": str(self.path), "test_dir": test_dir, **settings}
        with missing_packages_named():
            return evaluate(verb_settings(TestSettings, "test", chosen), self.predictor)

    def explain(self, image: ImageLike, label: str | None = None) -> ImageExplanation:
        """Return a heat map of what in an image is evidence for a class.

        The gradients of the checkpoint are used where PyTorch and model.ckpt are there, else occlusion.

        Args:
            image: As for `predict`.
            label: The class; None: the predicted one.

        Raises:
            UnreadableImage: The image cannot be read.
            ConfigError: The model has no such class.
        """
        answer = next(self.iter_predict([image]))
        if answer.error:
            raise UnreadableImage(answer.path, answer.error)
        label = answer.label if label is None else label
        if label not in self.classes:
            raise ConfigError(f"the model has no class {label!r}", f"its classes are {listed(self.classes, 20)}")
        explain = self._gradients if self._has_checkpoint() else self._occlusion
        picture, heat, method = explain(answer.content, label)
        return ImageExplanation(answer.path, label, answer.probabilities[label], picture, heat, method)

    def _has_checkpoint(self) -> bool:
        is_checkpoint = self.path.suffix == ".ckpt" or (self.path / "model.ckpt").is_file()
        return is_checkpoint and find_spec("torch") is not None

    def _gradients(self, content: Content, label: str) -> Explained:
        return explainer_of(self.path, limits=self.predictor.limits)(content, label)

    def _occlusion(self, content: Content, label: str) -> Explained:
        from image_classifier.inference.occlusion import occlusion_map

        preprocess, limits = self.predictor.preprocess, self.predictor.limits
        pixels = preprocess.read(content, limits).transpose(2, 0, 1)
        plane = occlusion_map(pixels, label, self.predictor, self.predictor.backend.logits).plane
        return Explained(*over_picture(content, plane, preprocess, limits), "occlusion")

    def export(self, *forms: str, **settings: Any) -> list[ExportResult]:
        """Write other forms of the model into its bundle, each compared with the checkpoint, as `export` does.

        Args:
            forms: onnx, sealed, int8, openvino, tensorrt, mlflow, triton.
            settings: Other keys of conf/export.yaml, such as `data_dir="photos/"`.

        Raises:
            ConfigError: A form is unknown, or needs a package that is missing.
            ParityError: A form answers differently from the checkpoint and is not kept.
        """
        with missing_packages_named():
            from image_classifier.cli.python_settings import verb_settings
            from image_classifier.exporting.export import ExportSettings, export

            if not (self.path / INFO_NAME).is_file():
                raise ConfigError(
                    f"{str(self.path)!r} is not a bundle", "load the bundle's folder to export other forms"
                )
            chosen = {"checkpoint_name": str(self.path), "to": forms, **settings}
            return export(verb_settings(ExportSettings, "export", chosen))


def _is_one_image(images: Any) -> bool:
    """Return whether `predict` is given one image rather than several."""
    if isinstance(images, np.ndarray):
        return images.ndim != 4
    if isinstance(images, str | os.PathLike):
        name = os.fspath(images)
        is_pattern = glob.has_magic(name) and not os.path.exists(name)
        holds_several = is_archive_name(name) or is_table(Path(name)) or os.path.isdir(name)
        return not (is_pattern or holds_several or name == STDIN)
    return isinstance(images, bytes | bytearray | memoryview | Image.Image)


def _image_sources(images: Any) -> Iterator[ImageSource]:
    """Yield every image, named by its path, or by its number where it has none."""
    items = [images] if isinstance(images, str | os.PathLike) or _is_one_image(images) else images
    for number, item in enumerate(items):
        if isinstance(item, str | os.PathLike):
            yield from Inputs([os.fspath(item)], lambda: sys.stdin.buffer)
        elif isinstance(item, bytes | bytearray | memoryview):
            yield ImageSource(f"image {number}", bytes(item))
        elif isinstance(item, Image.Image | np.ndarray):
            yield ImageSource(getattr(item, "filename", "") or f"image {number}", _as_png(item))
        else:
            raise ConfigError(
                f"{type(item).__name__} is not an image",
                "give a path, an address, bytes, a PIL image or an array uint8 [H, W, 3]",
            )


def _as_png(image: Image.Image | np.ndarray) -> bytes:
    """Return an image in memory as a PNG file, so that it is decoded by the same rules as a file."""
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (1, 3, 4)):
            raise ConfigError(
                f"an array of {image.dtype} {list(image.shape)} is not an image",
                "give RGB pixels from 0 to 255 as uint8 [H, W, 3]",
            )
        image = Image.fromarray(image[:, :, 0] if image.ndim == 3 and image.shape[2] == 1 else image)
    if image.mode not in _MODES:
        if image.mode in ("F", "I"):
            raise ConfigError(f"a PIL image of mode {image.mode} has no fixed range", "convert it to RGB first")
        image = image.convert("RGBA" if image.mode in ("PA", "La", "RGBa") else "RGB")
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1, exif=image.getexif())  # with the orientation that a camera noted
    return buffer.getvalue()


@contextmanager
def _logging_to_stderr(verbose: bool) -> Iterator[None]:
    """Show this package's log lines in the block, unless the program has set up logging itself."""
    logger = logging.getLogger("image_classifier")
    if not verbose or logger.hasHandlers():
        yield
        return
    handler, level = logging.StreamHandler(sys.stderr), logger.level
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
