"""A run is logged where the store answers, and never lost where it does not."""

import http.server
import json
import logging
import threading
from pathlib import Path

import pytest

from image_classifier.errors import ConfigError
from image_classifier.mlflow_tracking import Tracker


def read_back(uri: str, run_id: str) -> tuple[dict[str, float], dict[str, str], str]:
    from mlflow.tracking import MlflowClient

    run = MlflowClient(tracking_uri=uri).get_run(run_id)
    return run.data.metrics, run.data.params, run.info.status


@pytest.mark.slow
def test_everything_is_logged_to_a_local_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tracker = Tracker("sqlite:///mlflow.db", "tests", "run", {"kind": "test"})
    tracker.log_params({f"key.{number}": number for number in range(130)})
    tracker.log_metrics({"val/f1_macro": 0.5, "train/loss": 1.5}, step=1)
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "loss.png").write_bytes(b"png")
    tracker.log_artifacts(tmp_path / "plots", "plots")
    tracker.log_table({"path": ["a.png", "b.png"], "correct": [True, False]}, "test/answers")
    tracker.finish()
    metrics, params, status = read_back(f"sqlite:///{tmp_path}/mlflow.db", tracker.run_id)
    assert (metrics, len(params), status) == ({"val/f1_macro": 0.5, "train/loss": 1.5}, 130, "FINISHED")
    assert list(tmp_path.glob("mlruns/*/*/artifacts/plots/loss.png"))
    (table,) = tmp_path.glob("mlruns/*/*/artifacts/test/answers.json")
    assert json.loads(table.read_text()) == {
        "columns": ["path", "correct"],
        "data": [["a.png", True], ["b.png", False]],
    }
    assert tracker.run_id in tracker.where


def test_a_dead_server_warns_once_and_everything_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        tracker = Tracker("http://127.0.0.1:9", "tests", "run", {})
        for step in range(3):
            tracker.log_metrics({"train/loss": 1.0}, step)
        tracker.finish()
    mine = [record.getMessage() for record in caplog.records if record.name == "image_classifier.mlflow_tracking"]
    assert len([line for line in mine if "training continues" in line]) == 1
    assert "calls to MLflow" in mine[-1]
    assert "did not answer" in tracker.where


@pytest.mark.slow
def test_what_was_said_while_the_store_was_down_is_logged_when_it_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tracker = Tracker("sqlite:///mlflow.db", "tests", "run", {})
    tracker.log_metrics({"train/loss": 3.0}, 1)
    client, tracker._client = tracker._client, _Refusing()
    tracker.log_metrics({"train/loss": 2.0}, 2)
    tracker.log_metrics({"train/loss": 1.0}, 3)
    assert tracker.lost_contact
    tracker._client = client
    tracker.finish()
    assert read_back(f"sqlite:///{tmp_path}/mlflow.db", tracker.run_id)[0] == {"train/loss": 1.0}
    assert len(client.get_metric_history(tracker.run_id, "train/loss")) == 3
    assert not tracker.lost_contact


@pytest.mark.slow
def test_a_value_the_store_refuses_does_not_block_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tracker = Tracker("sqlite:///mlflow.db", "tests", "run", {})
    tracker.log_metrics({"not a name: \n*": 1.0}, 1)
    tracker.log_metrics({"train/loss": 1.0}, 1)
    assert read_back(f"sqlite:///{tmp_path}/mlflow.db", tracker.run_id)[0] == {"train/loss": 1.0}


@pytest.mark.slow
def test_a_run_that_goes_on_logs_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runs = []
    for resumed in (False, True):
        tracker = Tracker("sqlite:///mlflow.db", "tests", "run", {})
        tracker.continue_as("abc", resumed)
        tracker.log_params({"lr": 0.1, "resume": resumed})
        for step in (1, 2, 3) if resumed else (1, 2):
            tracker.log_metrics({"train/loss": 1.0 / step}, step)
        if resumed:
            tracker.finish()
        runs.append(tracker.run_id)
    assert runs[0] == runs[1]
    metrics, params, status = read_back(f"sqlite:///{tmp_path}/mlflow.db", runs[0])
    assert (
        params == {"lr": "0.1", "resume": "False"}
        and status == "FINISHED"
        and metrics["train/loss"] == pytest.approx(1 / 3)
    )
    assert [point.step for point in tracker._client.get_metric_history(runs[0], "train/loss")] == [1, 2, 3]
    other = Tracker("sqlite:///mlflow.db", "tests", "run", {})
    other.continue_as("a run whose first part logged nothing", True)
    other.log_metrics({"train/loss": 1.0}, 1)
    assert other.run_id and other.run_id != runs[0]


def test_a_server_that_answers_nonsense_is_like_a_dead_one() -> None:
    class Nonsense(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>not MLflow</html>")

        do_POST = do_GET

        def log_message(self, *arguments: object) -> None: ...

    with http.server.HTTPServer(("127.0.0.1", 0), Nonsense) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        tracker = Tracker(f"http://127.0.0.1:{server.server_port}", "tests", "run", {})
        tracker.log_metrics({"train/loss": 1.0}, 1)
        tracker.finish()
        server.shutdown()
    assert tracker.lost_contact


def test_a_folder_as_store_is_refused_before_anything_runs() -> None:
    with pytest.raises(ConfigError, match="sqlite:///mlflow.db"):
        Tracker("./mlruns", "tests", "run", {})


class _Refusing:
    def __getattr__(self, name: str) -> object:
        raise ConnectionError("the store is down")
