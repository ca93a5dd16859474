"""The verbs `infer` and `test` on a trained bundle, as a shell would call them."""

import csv
import io
import json
import shutil
from pathlib import Path

import pytest

from tests.conftest import Command

KEYS = {"path", "predicted_class", "confidence", "all_predictions", "decision", "reason", "prediction_set"}


@pytest.fixture(autouse=True)
def in_the_trained_folder(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained)


def test_json_jsonl_csv_and_table_say_the_same(command: Command) -> None:
    def ask(form: str) -> str:
        answer = command("infer", "--checkpoint_name", "digits", "--images", "data/digits/test/3", "--format", form)
        assert answer.code == 0, answer.err
        return answer.out

    answers = json.loads(ask("json"))
    assert [set(answer) for answer in answers] == [KEYS] * len(answers) and len(answers) == 36
    assert all(sum(answer["all_predictions"].values()) == pytest.approx(1) for answer in answers)
    assert [json.loads(line) for line in ask("jsonl").splitlines()] == answers
    rows = list(csv.DictReader(io.StringIO(ask("csv"))))
    assert [row["predicted_class"] for row in rows] == [answer["predicted_class"] for answer in answers]
    lines = ask("table").splitlines()
    assert all(answer["path"] in line for answer, line in zip(answers, lines[1:], strict=True))


def test_checkpoint_and_onnx_give_equal_answers(command: Command) -> None:
    onnx, torch = (
        json.loads(
            command(
                "infer",
                "checkpoint_name=digits",
                "--images",
                "data/digits/test",
                "--backend",
                backend,
                "--format",
                "json",
            ).out
        )
        for backend in ("onnx", "checkpoint")
    )
    assert len(onnx) == 355
    assert [answer["predicted_class"] for answer in onnx] == [answer["predicted_class"] for answer in torch]
    for first, second in zip(onnx, torch, strict=True):
        assert first["all_predictions"] == pytest.approx(second["all_predictions"], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "source", ["runs/digits/checkpoints/best.ckpt", "models/digits/model.ckpt", "models/digits/model.onnx"]
)
def test_a_file_alone_is_enough(command: Command, trained: Path, source: str) -> None:
    target = trained / "models" / f"model_val_loss=1.12{Path(source).suffix}"
    shutil.copy(source, target)
    try:
        for line in (
            ("--checkpoint_name", target.name),
            (f"checkpoint_name={target.name}",),
            ("--checkpoint_name", str(target)),
        ):
            answer = command("infer", *line, "--images", "data/digits/test/0", "--format", "jsonl", "--top_k", "2")
            assert answer.code == 0, answer.err
            assert len(json.loads(answer.out.splitlines()[0])["all_predictions"]) == 2
    finally:
        target.unlink()


def test_a_broken_image_is_a_row_and_exit_code_2(command: Command, tmp_path: Path) -> None:
    bad = tmp_path / "half $HOME's = ${x}, [1].png"
    bad.write_bytes(
        Path("data/digits/test/0/0010.png").read_bytes()[:60]
        if Path("data/digits/test/0/0010.png").exists()
        else b"\x89PNG"
    )
    good = next(Path("data/digits/test/0").iterdir())
    answer = command(
        "infer",
        "--checkpoint_name",
        "digits",
        "--format",
        "jsonl",
        "--images",
        str(bad),
        str(good),
        str(tmp_path / "none.png"),
    )
    rows = [json.loads(line) for line in answer.out.splitlines()]
    assert answer.code == 2
    assert [set(row) for row in rows] == [{"path", "error"}, KEYS, {"path", "error"}]
    assert rows[0]["path"] == str(bad)
    assert "error: 2 of 3 images could not be read" in answer.err.splitlines()[-1]


def test_answers_go_to_a_file_whole_or_not_at_all(command: Command, tmp_path: Path) -> None:
    output = tmp_path / "answers.csv"
    line = (
        "infer",
        "--checkpoint_name",
        "digits",
        "--images",
        "data/digits/test/1",
        "--format",
        "csv",
        "--output",
        str(output),
    )
    assert command(*line).out == ""
    assert len(output.read_text().splitlines()) == 37
    assert sorted(path.name for path in tmp_path.iterdir()) == [".answers.csv.run", "answers.csv"]


def test_the_test_verb_repeats_the_figures_of_the_run(command: Command, trained: Path, tmp_path: Path) -> None:
    answer = command("test", "--checkpoint_name", "digits", "--format", "json", "--output_dir", str(tmp_path))
    recorded = json.loads((trained / "models/digits/bundle.json").read_text())["metrics"]["test"]
    assert answer.code == 0, answer.err
    assert json.loads(answer.out)["accuracy"] == recorded["accuracy"]
    figures = ("confusion_matrix", "class_scores", "reliability", "risk_coverage")
    pictures = {f"{name}.{kind}" for name in figures for kind in ("png", "svg")} | {"samples.png"}
    names = {"metrics.json", "predictions.csv", "logits.npy", "predictions.json", "calibration.json"} | pictures
    assert {path.name for path in tmp_path.iterdir()} == names


@pytest.mark.slow
def test_a_labelled_folder_of_ones_own_can_be_tested(command: Command, tmp_path: Path) -> None:
    for label in ("3", "7"):
        shutil.copytree(f"data/digits/test/{label}", tmp_path / "mine" / label)
    answer = command(
        "test",
        "--checkpoint_name",
        "digits",
        "--test_dir",
        str(tmp_path / "mine"),
        "--output_dir",
        str(tmp_path / "out"),
    )
    assert answer.code == 0, answer.err
    assert "test images 71" in answer.out and "no image in this split: 0, 1" in answer.out


def test_images_that_changed_since_training_are_noticed(command: Command, trained: Path) -> None:
    victim = next((trained / "data/digits/test/5").iterdir())
    content = victim.read_bytes()
    other = next((trained / "data/digits/test/6").iterdir())
    try:
        victim.write_bytes(other.read_bytes())
        answer = command("test", "--checkpoint_name", "digits")
    finally:
        victim.write_bytes(content)
    assert answer.code == 2 and "has changed since training" in answer.err


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (("infer", "--checkpoint_name", "digit", "--images", "data"), "did you mean digits?"),
        (("infer", "--checkpoint_name", "digits", "--images", "nothing/*.png"), "holds no image"),
        (
            ("infer", "--checkpoint_name", "digits", "--images", "data/digits", "--format", "xml"),
            "use one of table, json",
        ),
        (
            ("infer", "--checkpoint_name", "digits", "--images", "data/digits", "--backend", "tensorflow"),
            "use one of onnx, checkpoint",
        ),
        (("infer", "--checkpoint_name", "digits"), "images"),
        (("test", "--checkpoint_name", "digits", "--test_dir", "data/digits/test/3"), "infer"),
        (("test", "--checkpoint_name", "digits", "--split", "dev"), "use one of train, val, test"),
    ],
)
def test_what_cannot_be_is_one_line_and_exit_code_2(command: Command, line: tuple[str, ...], says: str) -> None:
    answer = command(*line)
    assert answer.code == 2
    assert answer.out == ""
    assert [text for text in answer.err.splitlines() if text.startswith("error: ")] == answer.err.splitlines()[-1:]
    assert says in answer.err and "Traceback" not in answer.err


@pytest.mark.parametrize("damage", [b"", b"not a model", None])
def test_a_damaged_bundle_is_noticed(command: Command, trained: Path, tmp_path: Path, damage: bytes | None) -> None:
    shutil.copytree(trained / "models/digits", tmp_path / "bundle")
    model = tmp_path / "bundle/model.onnx"
    model.write_bytes(model.read_bytes()[:1000] if damage is None else damage)
    answer = command("infer", "--checkpoint_name", str(tmp_path / "bundle"), "--images", "data/digits/test/0")
    assert answer.code == 2 and "model.onnx" in answer.err and "damaged" in answer.err


@pytest.mark.parametrize("suffix", [".ckpt", ".onnx"])
def test_a_foreign_file_is_refused(command: Command, tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"model{suffix}").write_bytes(b"PK\x03\x04 something else")
    answer = command("infer", "--checkpoint_name", str(tmp_path / f"model{suffix}"), "--images", "data/digits/test/0")
    assert answer.code == 2 and "error: " in answer.err


@pytest.mark.parametrize(
    "backbone",
    [
        {"_target_": "timm.models.load_state_dict", "checkpoint_path": "evil.pth"},
        {"_target_": "pytorch_lightning.Trainer"},
        {"_target_": "image_classifier.inference.checkpoint.load_classifier", "path": "evil.ckpt", "trusted": ["evil"]},
        {"_target_": "torch.hub.load", "repo_or_dir": "evil"},
        {"_target_": "torch.nn.init.torch.load", "f": "evil.pth"},
    ],
    ids=lambda node: node["_target_"],
)
def test_a_checkpoint_cannot_make_us_run_or_load_anything_else(
    command: Command, tmp_path: Path, backbone: dict[str, object]
) -> None:
    import torch

    content = torch.load("models/digits/model.ckpt", weights_only=True)
    content["hyper_parameters"]["blueprint"]["backbone"] = backbone
    torch.save(content, tmp_path / "evil.ckpt")
    answer = command("infer", "--checkpoint_name", str(tmp_path / "evil.ckpt"), "--images", "data/digits/test/0")
    assert answer.code == 2 and answer.out == ""
    assert backbone["_target_"] in answer.err and "Traceback" not in answer.err


def test_a_folder_of_the_bundles_name_does_not_hide_it(
    command: Command, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "digits").mkdir()
    monkeypatch.chdir(tmp_path)
    image = next((trained / "data/digits/test/0").iterdir())
    answer = command(
        "infer", "--checkpoint_name", "digits", "--models_dir", str(trained / "models"), "--images", str(image)
    )
    assert answer.code == 0, answer.err


@pytest.mark.slow
def test_results_go_under_the_whole_name_of_a_bundle(command: Command, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "models/digits", tmp_path / "v1.5")
    answer = command(
        "test", "--checkpoint_name", str(tmp_path / "v1.5"), "--plots_dir", str(tmp_path / "plots"), "--split", "val"
    )
    assert answer.code == 0, answer.err
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["v1.5"]
