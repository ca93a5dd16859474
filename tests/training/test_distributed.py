"""Several processes, one training: the shares fit together, the result is that of one process, and however one ends,
all do.
"""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from image_classifier.cli.train_config import compose_train_config
from image_classifier.errors import ConfigError, DataError
from image_classifier.training import distributed, launch
from image_classifier.training.datamodule import BalancedBatches, ShuffledBatches
from image_classifier.training.run import train
from tests.conftest import QUICK, write_image

ROOT = Path(__file__).resolve().parents[2]


def rank_environment(rank: int, world_size: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world_size),
    }


@contextmanager
def as_rank(rank: int, world_size: int) -> Iterator[None]:
    with mock.patch.dict(os.environ, rank_environment(rank, world_size)):
        yield


SLURM = {
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_STEP_NUM_NODES": "3",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "6",
}


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, (0, 1, 0, 1)),
        (rank_environment(1, 4), (1, 4, 1, 4)),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}, (5, 8, 1, 4)),
        (SLURM, (5, 6, 1, 2)),
        (SLURM | rank_environment(0, 2), (0, 2, 0, 2)),  # torchrun inside of a SLURM job
        ({"SLURM_NTASKS": "6", "SLURM_PROCID": "0", "SLURM_JOB_ID": "1"}, (0, 1, 0, 1)),  # a batch script without srun
        (
            SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
            (0, 1, 0, 1),
        ),  # a shell from srun --pty, or one job of a sweep
    ],
)
def test_a_process_finds_its_place_in_what_its_launcher_says(
    environment: dict[str, str], place: tuple[int, ...]
) -> None:
    assert distributed.rank_info(environment) == distributed.RankInfo(*place)


def test_nodes_with_different_numbers_of_processes_are_refused() -> None:
    with pytest.raises(ConfigError, match="evenly"):
        distributed.rank_info(SLURM | {"SLURM_STEP_NUM_TASKS": "5"})


@given(st.integers(1, 60), st.integers(1, 8), st.integers(1, 5), st.integers(0, 3), st.booleans())
def test_the_ranks_parts_put_together_are_one_processes_epoch(
    num_rows: int, per_rank: int, world_size: int, epoch: int, balanced: bool
) -> None:
    rows, targets = np.arange(100, 100 + num_rows), np.arange(num_rows) % 3

    def batches() -> list[np.ndarray]:
        size = per_rank * world_size
        sampler = BalancedBatches(rows, size, 7, targets) if balanced else ShuffledBatches(rows, size, 7)
        sampler.set_epoch(epoch)
        return list(sampler)

    alone, parts = batches(), []
    for rank in range(world_size):
        with as_rank(rank, world_size):
            parts.append(batches())
    assert [np.concatenate(shares).tolist() for shares in zip(*parts, strict=True)] == [
        batch.tolist() for batch in alone
    ]
    if num_rows >= per_rank * world_size:
        assert {len(batch) for part in parts for batch in part} == {per_rank}


@given(st.integers(0, 50), st.integers(1, 9))
def test_shares_follow_one_another_and_are_even(num_rows: int, world_size: int) -> None:
    shares = []
    for rank in range(world_size):
        with as_rank(rank, world_size):
            shares.append(distributed.rank_share(np.arange(num_rows)))
    assert np.concatenate(shares).tolist() == list(range(num_rows))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_batch_that_cannot_be_shared_evenly_is_refused() -> None:
    with as_rank(0, 3):
        distributed.check_rank_shares(66, 100, 10)
        with pytest.raises(ConfigError, match="such as 63"):
            distributed.check_rank_shares(64, 100, 10)
        with pytest.raises(DataError, match="too few for 3 processes"):
            distributed.check_rank_shares(66, 100, 2)


@pytest.mark.parametrize(("devices", "count"), [(1, 1), ("auto", 1), (-1, 1), ("3", 3), (2, 2)])
def test_devices_of_the_processor_are_processes(devices: object, count: int) -> None:
    assert launch.device_count("cpu", devices) == count


@pytest.mark.parametrize("devices", [0, "many", [0, 1]])
def test_devices_that_cannot_be_are_refused(devices: object) -> None:
    with pytest.raises(ConfigError, match=r"trainer\.devices"):
        launch.device_count("cpu", devices)


def test_only_the_verb_starts_processes_and_only_on_this_machine() -> None:
    assert not launch.needs_ranks("cpu", 1, 1) and launch.needs_ranks("cpu", 2, 1)
    with pytest.raises(ConfigError, match="torchrun"):
        launch.needs_ranks("cpu", 2, 2)
    with as_rank(0, 2):
        assert not launch.needs_ranks("cpu", 2, 1)  # a rank starts no others
    config = compose_train_config(["trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu"])
    with pytest.raises(ConfigError, match=r"trainer\.devices=1"):
        train(config)  # from Python


@pytest.mark.parametrize(
    ("devices", "seen", "chosen"), [([1, 3], "", "1,3"), ("0,2", "4,5,6", "4,6"), (2, "4,5,6", None)]
)
def test_a_list_of_gpus_is_what_the_ranks_see(
    devices: object, seen: str, chosen: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "uses_gpu", lambda accelerator: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
    assert launch._visible("gpu", devices).get("CUDA_VISIBLE_DEVICES") == chosen


def test_alone_every_rank_function_gives_back_what_it_was_given() -> None:
    with distributed.process_group(on_gpu=False):
        assert (
            distributed.broadcast(3)
            == distributed.from_rank_zero(lambda: 3)
            == distributed.first_on_each_node(lambda: 3)
            == 3
        )
        assert distributed.gather("x") == ["x"]
        assert distributed.gather_rows([torch.ones(2, 3), torch.zeros(1, 3)]).shape == (3, 3)


LINE = (
    "data=folder",
    "data.dir=tree",
    "data.image_size=16",
    "data.split.test=0.2",
    "model=mlp",
    "model.backbone.hidden=[16]",
    "augment=none",
)
LINE += (
    *QUICK,
    "scheduler=constant",
    "trainer.max_epochs=2",
    "trainer.speed=safe",
    "data.batch_size=8",
    "trainer.accelerator=cpu",
)
TWO = ("trainer=ddp", "trainer.devices=2")


def start(
    folder: Path, *line: str, launcher: tuple[str, ...] = (), environment: dict[str, str] | None = None
) -> subprocess.Popen[str]:
    command = [sys.executable, *launcher, str(ROOT / "commands.py"), "train", *line]
    env = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"} | (environment or {})
    return subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(folder: Path, *line: str, launcher: tuple[str, ...] = ()) -> tuple[int, str, str]:
    process = start(folder, *line, launcher=launcher)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def history(folder: Path, name: str) -> list[dict[str, float]]:
    with (folder / f"runs/{name}/metrics.csv").open() as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def predictions(folder: Path, name: str, split: str) -> tuple[list[str], np.ndarray]:
    with (folder / f"plots/{name}/{split}/predictions.csv").open() as file:
        return [row["path"] for row in csv.DictReader(file)], np.load(folder / f"plots/{name}/{split}/logits.npy")


def assert_same_run(folder: Path, one: str, other: str) -> None:
    for left, right in zip(history(folder, one), history(folder, other), strict=True):
        assert left == pytest.approx(right, rel=1e-4, abs=1e-6)
        assert left["val/accuracy"] == right["val/accuracy"] and left["val/f1_macro"] == right["val/f1_macro"]
    for split in ("val", "test"):
        paths, logits = predictions(folder, one, split)
        others, other_logits = predictions(folder, other, split)
        assert paths == others and len(set(paths)) == len(paths)
        np.testing.assert_allclose(logits, other_logits, rtol=1e-3, atol=1e-4)
    metrics = [json.loads((folder / f"plots/{name}/metrics.json").read_text())["test"] for name in (one, other)]
    assert metrics[0]["accuracy"] == metrics[1]["accuracy"] and metrics[0]["f1_macro"] == metrics[1]["f1_macro"]


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tree of images, uneven for two, and the run `one` of one process on it."""
    folder = tmp_path_factory.mktemp("ranks")
    for number in range(63):
        write_image(folder / "tree" / ("cat", "dog", "owl")[number % 3] / f"{number:03d}.png", number)
    code, _, err = run(folder, *LINE, "name=one")
    assert code == 0, err
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["ddp", "fsdp"])
def test_two_processes_end_where_one_does(single: Path, trainer: str) -> None:
    code, out, err = run(single, *LINE, f"trainer={trainer}", "trainer.devices=2", f"name={trainer}")
    assert code == 0, err
    assert_same_run(single, "one", trainer)
    assert out.count("test accuracy") == 1 and err.count("epoch 1/2") == 1 and "Warning" not in err, err
    assert (single / f"models/{trainer}/model.onnx").is_file()


@pytest.mark.slow
def test_torchrun_starts_the_same_run(single: Path) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    code, out, err = run(single, *LINE, "trainer=ddp", "name=torchrun", launcher=launcher)
    assert code == 0, err
    assert out.count("test accuracy") == 1
    assert_same_run(single, "one", "torchrun")


@pytest.mark.slow
def test_srun_starts_the_same_run_on_two_nodes(single: Path) -> None:
    """One process a node, as SLURM sets their environment; both nodes are this machine."""
    job = {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NUM_NODES": "2",
    }
    job |= {"SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"}
    tasks = [
        start(single, *LINE, "trainer=ddp", "name=srun", environment=job | {"SLURM_PROCID": str(rank)})
        for rank in range(2)
    ]
    ends = [task.communicate(timeout=300) for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], ends
    assert ends[0][0].count("test accuracy") == 1 and not ends[1][0] and not ends[1][1]
    assert_same_run(single, "one", "srun")


FAILS = """
from pytorch_lightning.callbacks import Callback
from image_classifier.errors import TrainingError
from image_classifier.training.distributed import rank

class OnOneRank(Callback):
    def on_train_batch_end(self, trainer, *rest):
        if rank() == 1 and trainer.global_step == 3:
            raise TrainingError("rank one is out of luck")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "says"),
    [
        (("data.batch_size=9",), "data.batch_size=9 cannot be shared by 2 processes"),
        (("data.dir=nowhere",), "nowhere"),  # found by the main rank while the other one waits
        (("trusted_packages=[unlucky]", "+callbacks.bad._target_=unlucky.OnOneRank"), "rank one is out of luck"),
    ],
    ids=("all", "main", "other"),
)
def test_an_error_on_one_rank_is_one_line_and_ends_all(single: Path, line: tuple[str, ...], says: str) -> None:
    (single / "unlucky.py").write_text(FAILS)
    begun = time.monotonic()
    code, out, err = run(single, *LINE, *TWO, "name=bad", *line)
    assert code == 2 and err.count("error: ") == 1 and says in err.splitlines()[-1] and "Traceback" not in err, err
    assert time.monotonic() - begun < 120 and not out
    assert not (single / "models/bad").exists()


def children(process: int) -> list[int]:
    found = [
        re.match(r"(\d+) \(.*\) \S (\d+)", path.read_text(errors="replace"))
        for path in Path("/proc").glob("[0-9]*/stat")
        if path.exists()
    ]
    return [int(match[1]) for match in found if match and int(match[2]) == process]


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_launcher_leaves_a_checkpoint_and_no_orphans(single: Path, number: signal.Signals) -> None:
    name = number.name.lower()
    process = start(single, *LINE, *TWO, f"name={name}", "trainer.max_epochs=10000", "callbacks.early_stopping=null")
    deadline = time.monotonic() + 200
    while (
        not (single / f"runs/{name}/checkpoints/last.ckpt").exists()
        and time.monotonic() < deadline
        and process.poll() is None
    ):
        time.sleep(0.2)
    ranks = children(process.pid)
    process.send_signal(number)
    for rank in ranks if number == signal.SIGTERM else ():
        os.kill(rank, number)  # as systemd does; the launcher passes it on once more
    _, err = process.communicate(timeout=100)
    assert process.returncode == (143 if number == signal.SIGTERM else -9), err
    assert len(ranks) == 2
    while any(map(is_alive, ranks)) and time.monotonic() < deadline + 60:
        time.sleep(0.2)
    assert not any(map(is_alive, ranks))
    assert torch.load(single / f"runs/{name}/checkpoints/last.ckpt", weights_only=True)["global_step"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["ddp", "fsdp"])
def test_two_processes_go_on_bit_for_bit(single: Path, trainer: str) -> None:
    several = (
        *LINE,
        f"trainer={trainer}",
        "trainer.devices=2",
        "model.backbone.dropout=0.2",
        "augment=light",
        "trainer.deterministic=true",
    )
    for name, epochs in ((f"{trainer}-whole", 4), (f"{trainer}-cut", 2)):
        code, _, err = run(single, *several, f"name={name}", f"trainer.max_epochs={epochs}")
        assert code == 0, err
    newest = sorted((single / f"runs/{trainer}-whole/checkpoints").glob("step-*.ckpt"))[-1]
    code, _, err = run(single, *several, f"resume=runs/{trainer}-cut", "trainer.max_epochs=4")
    assert code == 0, err
    again = sorted((single / f"runs/{trainer}-cut/checkpoints").glob("step-*.ckpt"))[-1]
    states = [torch.load(path, weights_only=True)["state_dict"] for path in (newest, again)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"), [(TWO, ("trainer=default",)), (("trainer=default",), TWO)], ids=("fewer", "more")
)
def test_a_run_goes_on_with_other_processes_and_says_so(
    single: Path, before: tuple[str, ...], after: tuple[str, ...], tmp_path: Path
) -> None:
    place = [f"{key}_dir={tmp_path / key}" for key in ("runs", "models", "plots")]
    code, _, err = run(single, *LINE, *place, *before, "name=moved", "trainer.max_epochs=1")
    assert code == 0, err
    code, _, err = run(single, *LINE, *place, *after, f"resume={tmp_path}/runs/moved", "trainer.max_epochs=2")
    assert code == 0 and "the results differ by rounding" in err, err
    with (tmp_path / "runs/moved/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    for left, right in zip(rows, history(single, "one"), strict=True):
        assert {key: float(value) for key, value in left.items()} == pytest.approx(right, rel=1e-4, abs=1e-6)
