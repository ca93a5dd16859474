"""Distillation: what the loss is, which teachers are refused, and that it helps, resumes and leaks nothing."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

from image_classifier.bundle import BundleInfo, read_bundle, seal
from image_classifier.dataset.pixel_cache import CacheSettings, PixelCache
from image_classifier.dataset.settings import DataSettings
from image_classifier.dataset.unlabelled import find_unlabelled, joined
from image_classifier.errors import CheckpointError, ConfigError, DataError
from image_classifier.manifest import Manifest, Record
from image_classifier.modeling.classifier import Classifier, build_classifier
from image_classifier.modeling.convnet import ConvNet
from image_classifier.modeling.losses import CrossEntropy, distillation_loss
from image_classifier.training.augment import BatchAugment, Mix
from image_classifier.training.bundle_writer import _provenance
from image_classifier.training.checkpoint_io import save_whole
from image_classifier.training.config import ModelConfig
from image_classifier.training.datamodule import ImageDataModule
from image_classifier.training.distillation import Distillation, Teacher, find_teacher, load_teacher
from image_classifier.training.module import ClassifierModule
from image_classifier.training.optimizers.schedules import SchedulerSettings
from image_classifier.training.reporting import Results, TrainedRun
from tests.conftest import QUICK, Command, MakeTree, listed, write_image
from tests.training.short_runs import Options, same, small_trainer, weights

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning", "ignore:.*num_workers.*:UserWarning")
CONVNET = "image_classifier.modeling.convnet.ConvNet"
SMALL = ("data=folder", "data.dir=tree", "data.image_size=16", "data.batch_size=4", "model.backbone.channels=[4,8]")
SHORT = (*SMALL, *QUICK, "trainer.deterministic=true", "scheduler=exponential")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine two would wait for each other
    yield
    torch.set_num_threads(threads)


def write_teacher(directory: Path, classes: tuple[str, ...], size: int = 16, seed: int = 0) -> Path:
    """A bundle of a random network."""
    torch.manual_seed(seed)
    backbone = {"_target_": CONVNET, "image_size": size, "channels": [4, 8]}
    classifier = build_classifier(ConvNet(size, (4, 8)), len(classes), size, [0.5] * 3, [0.25] * 3)
    facts = {"preprocess": {"size": size}, "normalise": {"mean": [0.5] * 3, "std": [0.25] * 3}}
    blueprint = {"classes": list(classes), "backbone": backbone, "head_dropout": 0.0, **facts}
    state = {f"classifier.{name}": value for name, value in classifier.state_dict().items()}
    directory.mkdir(parents=True, exist_ok=True)
    save_whole({"state_dict": state, "hyper_parameters": {"blueprint": blueprint}}, directory / "model.ckpt")
    metrics = {"test": {"accuracy": 0.75}}
    seal(directory, BundleInfo(directory.name, classes, facts["preprocess"], facts["normalise"], metrics, {}))
    return directory


def test_the_loss_is_that_of_the_paper() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 6, 5, generator=generator, dtype=torch.float64)
    student.requires_grad_()
    p = [torch.exp(logits / 3) / torch.exp(logits / 3).sum(dim=1, keepdim=True) for logits in (teacher, student)]
    expected = 9 * (p[0] * (p[0] / p[1]).log()).sum(dim=1).mean()
    loss = distillation_loss(student, teacher, temperature=3.0)
    assert torch.allclose(loss, expected, rtol=1e-12)
    # Equation 2 of the paper: the gradient of the cross-entropy with soft targets, times T squared.
    (gradient,) = torch.autograd.grad(loss, student)
    assert torch.allclose(gradient, 9 * (p[1] - p[0]) / 3 / len(student), rtol=1e-10)


def test_the_weight_divides_the_loss_between_teacher_and_labels() -> None:
    classifier = network(3, 8)
    pixels = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    logits, label_loss = torch.randn(5, 3), torch.tensor(2.0)
    taught = Teacher(classifier, 8, [0, 1, 2], 1.0, 2.0).joined(label_loss, logits, pixels)
    both = Teacher(classifier, 8, [0, 1, 2], 0.75, 2.0).joined(label_loss, logits, pixels)
    assert torch.isclose(both, 0.25 * label_loss + 0.75 * taught)


def test_classes_in_another_order_and_images_of_another_size_are_adapted(tmp_path: Path) -> None:
    write_teacher(tmp_path / "big", ("c", "a", "b"), size=24)
    model = ModelConfig(teacher="big", models_dir=str(tmp_path))
    bundle = find_teacher(model)
    assert bundle and bundle.accuracy == 0.75
    state = torch.get_rng_state()
    teacher = load_teacher(bundle, model, ("a", "b", "c"), channels_last=False)
    assert torch.equal(torch.get_rng_state(), state)
    pixels = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    large = functional.interpolate(pixels.float(), 24, mode="bilinear", antialias=True)
    expected = teacher.classifier(large)[:, [1, 2, 0]]
    answers = teacher.logits(pixels)
    assert torch.equal(answers, expected) and not answers.requires_grad
    assert copy.deepcopy(teacher) is teacher and not teacher.classifier.training


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (("model.teacher=nobody",), "there is no checkpoint 'nobody'"),
        (("model.teacher=fewer",), "the teacher 'fewer' has other classes than the data: it lacks 'dog'"),
        (("model.teacher=more",), "only it has 'emu'"),
        (("model.teacher=big", "model.teacher_weight=0"), "model.teacher_weight must be above 0 and at most 1, got 0"),
        (("model.teacher=big", "model.teacher_temperature=-1"), "model.teacher_temperature must be above 0"),
        (("model.unlabelled=more",), "model.unlabelled needs a teacher"),
        (("model.teacher=big", "model.unlabelled=nowhere"), "'nowhere' is neither a folder nor a table"),
        (("model.teacher=big", "loss=supcon"), "this loss trains only the head"),
    ],
)
def test_what_cannot_be_is_one_line(
    line: tuple[str, ...],
    says: str,
    tmp_path: Path,
    make_tree: MakeTree,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    make_tree(cat=10, dog=10)
    for name, classes in {"big": ("cat", "dog"), "fewer": ("cat",), "more": ("cat", "dog", "emu")}.items():
        write_teacher(tmp_path / "models" / name, classes)
    answer = command("train", *SHORT, "trainer.max_epochs=1", *line)
    errors = [text for text in answer.err.splitlines() if text.startswith("error: ")]
    assert answer.code == 2 and len(errors) == 1 and says in errors[0], answer.err
    assert not list(tmp_path.glob("runs/*/checkpoints"))
    assert "loss=supcon" in line or not (tmp_path / "data/cache").exists() or not list(tmp_path.rglob("pixels.u8"))


def test_no_teacher_judges_images_that_it_was_trained_on(command: Command) -> None:
    answer = command("suspects", *SHORT, "model.teacher=big")
    assert answer.code == 2 and "suspects takes no model.teacher" in answer.err


def test_a_damaged_teacher_is_refused(tmp_path: Path) -> None:
    path = write_teacher(tmp_path / "big", ("a", "b"))
    (path / "model.ckpt").write_bytes(b"0" * 100)
    with pytest.raises(CheckpointError, match="is damaged"):
        find_teacher(ModelConfig(teacher=str(path)))


def test_a_run_resumes_to_the_bit_and_only_with_its_own_teacher(
    tmp_path: Path, make_tree: MakeTree, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_tree(cat=10, dog=10)
    for seed in range(7):
        write_image(tmp_path / "more" / f"{seed}.png", 1000 + seed)
    write_teacher(tmp_path / "models/big", ("dog", "cat"), size=20)
    distil = ("model.teacher=big", "model.unlabelled=more", "augment=mix", "callbacks=ema")
    # ONNX would take most of so short a run.
    provenances = []

    def write_bundle(trained: TrainedRun, results: Results) -> dict[str, Any]:
        provenances.append(_provenance(trained))
        return provenances[-1]

    monkeypatch.setattr("image_classifier.training.run.write_bundle", write_bundle)
    whole = command("train", *SHORT, *distil, "name=whole", "trainer.max_epochs=2")
    assert whole.code == 0, whole.err
    sha256 = read_bundle(tmp_path / "models/big").info.files["model.ckpt"]
    facts = {"name": "big", "sha256": sha256, "split": "test", "accuracy": 0.75, "unlabelled_images": 7}
    assert provenances[0]["teacher"] == facts
    # The same run in two parts.
    stopped = command("train", *SHORT, *distil, "name=cut", "trainer.max_epochs=1")
    assert stopped.code == 0, stopped.err
    refusal = "model.teacher is not what it was when the run began"
    write_teacher(tmp_path / "models/big", ("dog", "cat"), size=20, seed=1)
    answer = command("train", "name=cut", "resume=last", "trainer.max_epochs=2")
    assert answer.code == 2 and refusal in answer.err
    write_teacher(tmp_path / "models/big", ("dog", "cat"), size=20)
    answer = command("train", "name=cut", "resume=last", "trainer.max_epochs=2")
    assert answer.code == 0, answer.err
    one, other = (weights(tmp_path / "runs" / name / "checkpoints/last.ckpt") for name in ("whole", "cut"))
    assert one and same(one, other)
    assert not [name for name in one if "teacher" in name]


def test_copies_of_held_out_images_and_damaged_files_are_left_out(
    tmp_path: Path, make_tree: MakeTree, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    parts = {"train": 4, "val": 3, "test": 3}
    for seed, (split, label) in enumerate((split, label) for split in parts for label in ("cat", "dog")):
        for number in range(parts[split]):
            write_image(tmp_path / "tree" / split / label / f"{number}.png", 100 * seed + number)
    manifest = listed(tmp_path / "tree")
    folder = tmp_path / "more"
    for number in range(5):
        write_image(folder / "deep" / f"{number}.png", 9000 + number)
    for split in ("val", "test"):
        (folder / f"{split}.png").write_bytes((tmp_path / "tree" / split / "cat" / "0.png").read_bytes())
    (folder / "broken.png").write_bytes(b"no image")
    (tmp_path / "table.csv").write_text("path\nmore/deep/0.png\nmore/gone.png\n")
    data = DataSettings(cache=CacheSettings(str(tmp_path / "cache")))
    found = find_unlabelled([str(folder), str(tmp_path / "table.csv")], data, manifest)
    assert sorted(path.rpartition("/")[2] for path in found.paths) == [f"{number}.png" for number in range(5)]
    assert "5 images; 2 images left out as in val or test" in caplog.text
    assert "2 unreadable images skipped: 'broken.png'" in caplog.text
    both = joined(manifest, found)
    assert [both.indices(split).tolist() for split in parts] == [manifest.indices(split).tolist() for split in parts]
    assert all((both.root / path).is_file() for path in both.paths)
    only_copies = [str(folder / "val.png")]
    (tmp_path / "copies.csv").write_text("path\n" + only_copies[0] + "\n")
    with pytest.raises(DataError, match="can be used"):
        find_unlabelled(str(tmp_path / "copies.csv"), data, manifest)
    with pytest.raises(ConfigError, match="a path or a list of paths"):
        find_unlabelled(3, data, manifest)


def table(num_train: int, num_val: int = 4, size: int = 8) -> tuple[Manifest, list[Record]]:
    splits = ["train"] * num_train + ["val"] * num_val
    records = [
        Record(f"{row:04d}.png", "ab"[row % 2], split, f"{row:016x}", f"{row:064x}", size, size)
        for row, split in enumerate(splits)
    ]
    return Manifest.of(Path("images"), records), records


@pytest.mark.parametrize(("num_train", "num_unlabelled", "share"), [(24, 24, 4), (24, 8, 2), (6, 600, 7), (60, 1, 1)])
@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("augment", [None, BatchAugment(mix=Mix()), BatchAugment(alternate_flip=True)])
def test_unlabelled_rows_fill_their_share_of_training_batches_only(
    num_train: int, num_unlabelled: int, share: int, balanced: bool, augment: BatchAugment | None
) -> None:
    manifest, _ = table(num_train)
    count = len(manifest) + num_unlabelled
    # Each image is of one grey level, which says its row modulo 256.
    pixels = np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, 8, 8, 3))
    paths = [f"/unlabelled/{number}.png" for number in range(num_unlabelled)]
    module = ImageDataModule(
        PixelCache(pixels, np.arange(count)), manifest, 8, augment, 0, False, balanced, unlabelled=paths
    )
    loader = module.train_dataloader()
    assert len(loader) == len(list(loader)) == num_train // (8 - share)
    seen = set()
    for number, (batch, rows) in enumerate(zip(loader, loader.sampler, strict=True)):
        images, targets = batch
        assert len(images) == 8 and len(targets) == 8 - share
        assert set(rows[: 8 - share].tolist()) <= set(manifest.indices("train").tolist())
        assert rows[8 - share :].min() >= len(manifest)
        assert targets.tolist() == manifest.targets[rows[: 8 - share]].tolist()
        assert module.paths_of(0, number)[8 - share :] == [paths[row - len(manifest)] for row in rows[8 - share :]]
        assert module.batch_rows(0, number).tolist() == rows.tolist()
        seen |= set(rows[8 - share :].tolist())
        changed, shares = module.augmented(batch, number, 0, rows)
        assert len(changed) == 8 and len(shares) == 8 - share
        again = module.augmented(batch, number, 0, rows)
        assert torch.equal(again[0], changed) and torch.equal(again[1], shares)
        if augment is None:
            assert torch.equal(changed, images)
    assert len(seen) >= min(num_unlabelled, len(loader) * share) * 0.9  # the epoch shows about all of them
    for split in ("val", "test"):
        assert all(batch.max() < len(manifest) for batch in module.in_order(split).sampler)


def network(num_classes: int, size: int, channels: tuple[int, ...] = (4, 8)) -> Classifier:
    torch.manual_seed(0)
    return build_classifier(ConvNet(size, channels), num_classes, size, [0.3] * 3, [0.35] * 3).eval()


def fitted(
    classifier: Classifier,
    manifest: Manifest,
    cache: PixelCache,
    folder: Path,
    epochs: int,
    teacher: Teacher | None = None,
    unlabelled: tuple[str, ...] = (),
) -> float:
    """Train a network; return its accuracy on val."""
    module = ClassifierModule(
        classifier.train(),
        criterion=CrossEntropy(),
        make_optimizer=partial(torch.optim.AdamW, lr=0.01),
        scheduler=SchedulerSettings(),
        classes=manifest.classes,
        blueprint={},
        teacher=teacher,
    )
    data = ImageDataModule(cache, manifest, 64, None, 0, False, balanced=False, unlabelled=unlabelled)
    trainer = small_trainer(Options(epochs=epochs, trainer={"check_val_every_n_epoch": epochs}), folder, [])
    trainer.fit(module, datamodule=data)
    return float(trainer.callback_metrics["val/accuracy"])


@pytest.mark.slow
def test_a_student_learns_more_from_a_teacher_than_from_a_tenth_of_the_labels(tmp_path: Path) -> None:
    digits = load_digits()
    grey = np.round(digits.images * 255 / 16).astype(np.uint8)
    pixels = np.ascontiguousarray(np.repeat(grey[..., None], 3, axis=3))
    count, num_labels = len(pixels), 100
    split = np.where(np.arange(count) < 1000, "train", "val")

    def manifest_of(rows: np.ndarray) -> Manifest:
        records = [
            Record(f"{row}.png", str(digits.target[row]), split[row], f"{row:016x}", f"{row:064x}", 8, 8)
            for row in rows.tolist()
        ]
        return Manifest.of(Path("digits"), records)

    whole, held_out = np.arange(count), np.arange(1000, count)
    large = network(10, 8, (16, 32))
    best = fitted(large, manifest_of(whole), PixelCache(pixels, whole), tmp_path, epochs=6)
    few = np.concatenate([np.arange(num_labels), held_out])
    alone = fitted(network(10, 8), manifest_of(few), PixelCache(pixels, few), tmp_path, epochs=40)
    rows = np.concatenate([few, np.arange(num_labels, 1000)])
    taught = fitted(
        network(10, 8),
        manifest_of(few),
        PixelCache(pixels, rows),
        tmp_path,
        epochs=12,
        teacher=Teacher(large, 8, range(10), 0.9, 2.0),
        unlabelled=tuple(f"{row}.png" for row in range(num_labels, 1000)),
    )
    assert best > 0.9 and taught > alone + 0.03, (best, taught, alone)
    assert not large.training and all(parameter.grad is None for parameter in large.parameters())


def test_a_teacher_that_saw_the_images_of_val_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    manifest, records = table(6)
    path = write_teacher(tmp_path / "big", ("a", "b"))
    seen = [Record(r.path, r.label, "train", r.group, r.sha256, r.width, r.height) for r in records[5:8]]
    Manifest.of(Path("x"), seen).write(path / "manifest.csv")
    bundle = find_teacher(ModelConfig(teacher=str(path)))
    assert bundle
    bundle.check(manifest)
    assert "2 of 4 val images are copies of training images of the teacher" in caplog.text
    assert Distillation(bundle).fingerprint == {"model.teacher": bundle.sha256} and Distillation(bundle).paths == ()


def test_a_loss_of_embeddings_takes_the_labelled_images_only() -> None:
    class Joint(nn.Module):
        takes_embeddings, head_apart = True, False

        def forward(self, logits: torch.Tensor, targets: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
            assert len(logits) == len(targets) == len(embeddings)
            return functional.cross_entropy(logits, targets)

    classifier = network(3, 8)
    module = ClassifierModule(
        classifier,
        criterion=Joint(),
        make_optimizer=partial(torch.optim.SGD, lr=0.1),
        scheduler=SchedulerSettings(),
        classes=("a", "b", "c"),
        blueprint={},
        teacher=Teacher(network(3, 8), 8, range(3), 0.5, 1.0),
    )
    pixels = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8)
    assert torch.isfinite(module.training_step((pixels, torch.tensor([0, 1])), 0))
