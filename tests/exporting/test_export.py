"""`export` and `verify`: a form of the model appears whole, held against the checkpoint, or not at all."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from image_classifier.bundle import Bundle, read_bundle
from image_classifier.errors import ParityError
from image_classifier.exporting import export
from image_classifier.exporting import sealed as sealed_model
from image_classifier.exporting.int8 import Drop
from image_classifier.exporting.parity import Parity
from image_classifier.inference import verify
from image_classifier.inference.golden import Golden
from image_classifier.inference.verify import checkable, verify_backend
from image_classifier.predictions import softmax
from tests.conftest import Command, run_apart


@pytest.fixture
def bundle(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle of one's own; its training data lies where it was made."""
    monkeypatch.chdir(trained)
    shutil.copytree(trained / "models/digits", tmp_path / "models/mine")
    return tmp_path / "models/mine"


def kept(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_every_form_is_held_against_the_checkpoint_and_verified(bundle: Path, command: Command) -> None:
    before = kept(bundle)
    answer = command("export", str(bundle), "--to", "sealed", "onnx", "--images", "40")
    assert answer.code == 0, answer.err
    assert [line.split()[:2] for line in answer.out.splitlines()] == [["sealed", "100.00%"], ["onnx", "100.00%"]]
    info = read_bundle(bundle).info
    assert set(info.exports) == {"sealed", "onnx"} and info.exports["sealed"]["files"] == ["sealed.onnx"]
    assert info.exports["onnx"]["images"] == 40 and info.exports["onnx"]["largest_difference"] < 1e-4
    assert set(kept(bundle)) - set(before) == {"sealed.onnx"} and info.classes == tuple("0123456789")
    verified = run_apart("verify", str(bundle))
    assert verified.code == 0, verified.err
    assert [line.split()[0] for line in verified.out.splitlines()][:3] == ["hashes", "onnx", "checkpoint"]
    assert verified.out.splitlines()[-1].startswith("sealed    100% of 8 golden images")


def test_what_disagrees_leaves_nothing_but_the_reason(
    bundle: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(reference: object, directory: Path) -> dict[str, object]:
        (directory / "half.onnx").write_bytes(b"half")
        raise ParityError("sealed gives another class on 3 of 40 images")

    monkeypatch.setattr(export, "export_sealed", broken)
    before = kept(bundle)
    answer = command("export", str(bundle), "--to", "sealed")
    assert answer.code == 2 and "another class on 3 of 40" in answer.err and "Traceback" not in answer.err
    after = kept(bundle)
    assert json.loads(after.pop("bundle.json"))["exports"] == {
        "sealed": {"refused": "sealed gives another class on 3 of 40 images", "files": []}
    }
    assert after == {name: content for name, content in before.items() if name != "bundle.json"}
    assert [path.name for path in bundle.parent.iterdir() if not path.name.endswith(".lock")] == ["mine"]


def test_a_graph_that_answers_otherwise_is_found_out(
    bundle: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real graph, a real gate: twice the temperature, so the same classes and other probabilities."""
    write = sealed_model.sealed
    monkeypatch.setattr(
        sealed_model,
        "sealed",
        lambda model, preprocess, temperature, facts: write(model, preprocess, 2 * temperature, facts),
    )
    answer = command("export", str(bundle), "--to", "sealed", "--images", "20")
    assert answer.code == 2 and "sealed.onnx" in answer.err and not (bundle / "sealed.onnx").exists()
    assert "sealed.onnx" in read_bundle(bundle).info.exports["sealed"]["refused"]


@pytest.mark.slow
def test_int8_and_openvino_are_made_of_real_images_and_keep_their_contract(bundle: Path) -> None:
    done = run_apart(
        "export",
        str(bundle),
        "--to",
        "openvino",
        "int8",
        "--int8.min_speedup",
        "0",
        "--int8.max_drop",
        "5",
        folder=Path.cwd(),
    )
    assert done.code == 0, done.err
    info = read_bundle(bundle).info
    assert info.exports["openvino"]["agreement"] == 1 and info.exports["openvino"]["largest_difference"] < 1e-3
    assert (
        info.exports["int8"]["drop"] <= 5
        and (bundle / "model.int8.onnx").stat().st_size < (bundle / "model.onnx").stat().st_size
    )
    verified = run_apart("verify", str(bundle))
    assert verified.code == 0 and "\nint8" in verified.out and "\nsealed" not in verified.out, verified.err
    refused = run_apart("export", str(bundle), "--to", "int8", "--int8.min_speedup", "50", folder=Path.cwd())
    assert refused.code == 2 and "times as fast" in refused.err and (bundle / "model.int8.onnx").is_file()


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (("--to", "gguf"), "there is no format 'gguf'"),
        (("--to", "sealed", "--images", "0"), "images must be at least 1"),
        (("--to", "sealed", "--data_dir", "nowhere"), "give the folder that holds them"),
        (("--to", "int8", "int8.max_drop=-1"), "int8.max_drop must be"),
        ((), "to"),
    ],
)
def test_bad_input_is_one_line(bundle: Path, command: Command, line: tuple[str, ...], says: str) -> None:
    before = kept(bundle)
    answer = command("export", str(bundle), *line)
    assert answer.code == 2 and says in answer.err and len(answer.err.strip().splitlines()) == 1
    assert kept(bundle) == before


@pytest.mark.parametrize("name", ["model.onnx", "golden.npz", "manifest.csv"])
def test_a_damaged_file_is_named_and_never_sealed_anew(bundle: Path, command: Command, name: str) -> None:
    content = bytearray((bundle / name).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / name).write_bytes(content)
    for line in (("verify", str(bundle)), ("export", str(bundle), "--to", "sealed")):
        answer = command(*line)
        assert answer.code == 2 and f"{name} of the bundle" in answer.err and "damaged" in answer.err


def test_another_models_weights_do_not_pass_for_the_golden_answers(bundle: Path, command: Command) -> None:
    """A file that was swapped together with its hash is found by what it answers."""
    content = json.loads((bundle / "bundle.json").read_text())
    with np.load(bundle / "golden.npz") as golden:
        np.savez(
            bundle / "golden.npz", pixels=golden["pixels"], logits=-golden["logits"], embeddings=golden["embeddings"]
        )
    import hashlib

    content["files"]["golden.npz"] = hashlib.sha256((bundle / "golden.npz").read_bytes()).hexdigest()
    (bundle / "bundle.json").write_text(json.dumps(content))
    answer = command("verify", str(bundle))
    assert answer.code == 2 and "0% of 8 golden images the right class" in answer.err


@pytest.mark.parametrize(
    ("name", "off", "mend"),
    [
        ("onnx", 1e-3, "export it again: --to onnx"),
        ("checkpoint", 1e-3, "copy the bundle again"),
        ("openvino", 1e-3, "--to openvino"),
        ("openvino-bf16", 1e-3, ""),
        ("openvino-bf16", 0.1, "use --backend openvino, which computes in float32"),
        ("tensorrt", 1e-3, ""),
        ("tensorrt", 0.1, "use --backend onnx"),
        ("sealed", 1e-3, "--to sealed"),
    ],
)
def test_each_backend_has_its_own_limit_and_its_own_way_out(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, name: str, off: float, mend: str
) -> None:
    known = read_bundle(bundle)
    golden = Golden.of(known)
    right = softmax(golden.logits, known.info.temperature)
    answers = known.info.temperature * np.log(
        right * (1 - off) + off / right.shape[1]
    )  # as sure as before but for about `off`

    class Fake:
        def logits(self, pixels: np.ndarray) -> np.ndarray:
            return answers

    monkeypatch.setattr(verify, "open_backend", lambda *_: Fake())
    monkeypatch.setattr(verify, "SealedSquares", lambda _: Fake())
    if not mend:
        assert verify_backend(known, name).agreement == 1
        return
    with pytest.raises(ParityError, match=mend):
        verify_backend(known, name)


def test_a_sealed_model_that_crops_is_not_asked_for_golden_squares(bundle: Path) -> None:
    known = read_bundle(bundle)
    files, squares = {**known.info.files, "sealed.onnx": "0" * 64}, known.info.preprocess
    infos = [replace(known.info, files=files, preprocess={**squares, "crop_fraction": part}) for part in (1, 0.9)]
    asked = [checkable(Bundle(bundle, info)) for info in infos]
    assert "sealed" in asked[0] and "sealed" not in asked[1]


def test_a_bundle_shares_its_files_with_the_one_it_replaces_and_old_readers_lose_nothing(
    bundle: Path, command: Command
) -> None:
    with (bundle / "model.onnx").open("rb") as reader:
        assert command("export", str(bundle), "--to", "sealed", "--images", "5").code == 0
        assert reader.read() == (bundle / "model.onnx").read_bytes()
        assert os.fstat(reader.fileno()).st_ino == (bundle / "model.onnx").stat().st_ino


def test_what_lay_in_a_forms_folder_does_not_stay_when_it_is_written_anew(bundle: Path, command: Command) -> None:
    """A server runs all that lies there; what people put beside the bundle's own files stays."""
    assert command("export", str(bundle), "--to", "triton", "--images", "5").code == 0
    (bundle / "triton/mine/2").mkdir(parents=True)
    (bundle / "triton/mine/2/model.py").write_text("a stranger's")
    (bundle / "notes/more").mkdir(parents=True)
    for note in ("notes.txt", "notes/more/why.txt"):
        (bundle / note).write_text("a person's")
    assert command("export", str(bundle), "--to", "triton", "sealed", "--images", "5").code == 0
    assert not (bundle / "triton/mine/2").exists() and (bundle / "notes/more/why.txt").read_text() == "a person's"
    assert set(kept(bundle)) - set(read_bundle(bundle).info.files) == {"notes.txt", "notes/more/why.txt", "bundle.json"}


def test_a_linked_bundle_is_exported_where_it_lies(bundle: Path, tmp_path: Path, command: Command) -> None:
    (tmp_path / "linked").symlink_to(bundle)
    for _ in range(2):
        assert command("export", str(tmp_path / "linked"), "--to", "sealed", "--images", "5").code == 0
    assert (tmp_path / "linked").is_symlink() and (bundle / "sealed.onnx").is_file()


@given(st.data())
def test_parity_names_the_image_that_is_worst(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 8))
    expected = np.array(data.draw(st.lists(st.permutations([0.7, 0.2, 0.1]), min_size=count, max_size=count)))
    shifts = np.array(data.draw(st.lists(st.floats(0, 0.2), min_size=count, max_size=count)))
    actual = expected - shifts[:, None]
    found = Parity.of(expected, actual, [str(row) for row in range(count)], "x")
    assert found.agreement == 1 and found.largest_difference == pytest.approx(shifts.max())
    assert shifts[int(found.worst_image)] == pytest.approx(
        shifts.max(), abs=1e-15
    )  # what is smaller is lost in the subtraction
    turned = actual.copy()
    turned[0] = turned[0][::-1] if expected[0].argmax() != 1 else turned[0][[1, 0, 2]]
    found = Parity.of(expected, turned, [str(row) for row in range(count)], "x")
    assert found.agreement == pytest.approx(1 - 1 / count) and found.worst_image == "0"


@given(st.integers(1, 400), st.integers(0, 6), st.floats(0, 5))
def test_the_contract_of_int8_counts_images(count: int, lost: int, most: float) -> None:
    targets = np.concatenate([np.zeros(count, np.int64), np.ones(count, np.int64)])
    expected = np.eye(2)[targets]
    actual = expected.copy()
    actual[: min(lost, count)] = [0, 1]
    drop = Drop.of(targets, expected, actual, ("a", "b"), most)
    gone = min(lost, count)
    assert drop.overall == pytest.approx(100 * gone / (2 * count)) and drop.accuracy == pytest.approx(
        1 - gone / (2 * count)
    )
    kept = 100 * gone / (2 * count) <= most + 1e-9 and gone <= max(1, np.floor(most / 100 * count))
    assert (not drop.breach) == kept
