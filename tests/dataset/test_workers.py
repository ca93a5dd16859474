from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from image_classifier.cpu import usable_cores
from image_classifier.dataset import workers
from image_classifier.dataset.workers import MANY, map_blocks
from image_classifier.errors import DataError

ROOT = Path(__file__).resolve().parents[2]
WAYS = pytest.mark.parametrize("items", [1, MANY], ids=["threads", "processes"])
PID = "__import__('os').getpid()"


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().split(")")[-1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def all_gone(processes: list[int]) -> bool:
    deadline = time.monotonic() + 10
    while any(map(alive, processes)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not any(map(alive, processes))


@given(blocks=st.lists(st.lists(st.integers())), count=st.integers(1, 5))
@settings(max_examples=50, deadline=None)
def test_results_are_those_of_map_in_order(blocks, count):
    assert list(map_blocks(sorted, blocks, 1, count)) == list(map(sorted, blocks))


def test_processes_give_the_same_in_order_and_are_gone_afterwards():
    blocks = [f"({n}, __import__('time').sleep({0.01 * (n % 3)}), {PID})" for n in range(40)]
    results = list(map_blocks(eval, blocks, MANY, 3))
    assert [number for number, _, _ in results] == list(range(40))
    processes = {process for _, _, process in results}
    assert 1 < len(processes) <= 3
    assert os.getpid() not in processes
    assert all_gone(list(processes))


def test_few_items_stay_in_this_process():
    assert set(map_blocks(eval, [PID] * 5, MANY - 1, 2)) == {os.getpid()}


@WAYS
def test_no_blocks_no_work(items):
    assert list(map_blocks(eval, [], items)) == []


@WAYS
def test_the_first_error_is_raised_here(items):
    blocks = ["1", "__import__('time').sleep(0.2) or int('x')", "1 / 0", "3"]
    results = map_blocks(eval, blocks, items, 2)
    assert next(results) == 1
    with pytest.raises(ValueError, match="invalid literal"):
        next(results)


def test_an_error_that_cannot_be_sent_is_told():
    with pytest.raises(RuntimeError, match="Odd: text"):
        list(map_blocks(eval, ["(_ for _ in ()).throw(type('Odd', (Exception,), {})('text'))"] * 2, MANY, 2))


def test_errors_keep_what_they_carry():
    code = (
        "(_ for _ in ()).throw(__import__('image_classifier.errors').errors.UnreadableImage('a.png', 'odd', 'mend it'))"
    )
    with pytest.raises(DataError, match="cannot read the image 'a.png' \\(odd\\): mend it"):
        list(map_blocks(eval, [code] * 2, MANY, 2))


@pytest.mark.parametrize(("ending", "told"), [("signal.raise_signal(9)", "SIGKILL"), ("os._exit(3)", "exit code 3")])
def test_a_lost_worker_is_one_line(ending, told):
    blocks = ["1", f"__import__('{ending.partition('.')[0]}').{ending.partition('.')[2]}", "2"]
    with pytest.raises(DataError, match=rf"a worker process ended with {told}: .*data.cache.workers=1") as caught:
        list(map_blocks(eval, blocks, MANY, 2))
    assert "\n" not in str(caught.value)


def test_what_a_worker_prints_does_not_disturb(capfd, monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    assert list(map_blocks(print, ["hello"] * 4, MANY, 2)) == [None] * 4
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("hello") == 4


def test_large_blocks_and_results_pass():
    blocks = [bytes([n]) * 3_000_000 for n in range(6)]
    assert list(map_blocks(bytes, blocks, MANY, 2)) == blocks


@WAYS
def test_no_more_blocks_are_taken_than_are_in_work(items):
    taken: list[int] = []

    class Blocks(list):
        def __iter__(self):
            for number, block in enumerate(list.__iter__(self)):
                taken.append(number)
                yield block

    results = map_blocks(len, Blocks(["x"] * 100), items, 2)
    for number in range(50):
        next(results)
        assert len(taken) <= number + 1 + 4
    results.close()
    assert len(taken) < 60


def test_closing_early_leaves_no_process():
    results = map_blocks(eval, [PID, PID, *["__import__('time').sleep(60)"] * 8], MANY, 2)
    processes = [next(results)]
    start = time.monotonic()
    results.close()
    assert time.monotonic() - start < 10
    assert all_gone(processes)


def test_without_another_python_threads_do(monkeypatch):
    monkeypatch.setattr(sys, "executable", "")
    assert set(map_blocks(eval, [PID] * 5, MANY, 2)) == {os.getpid()}


def test_where_no_process_can_be_started_threads_do(monkeypatch):
    def refuse(*_, **__):
        raise BlockingIOError("no more processes")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    assert set(map_blocks(eval, [PID] * 5, MANY, 2)) == {os.getpid()}


def test_a_bar_is_on_standard_error_and_nowhere_else(capfd):
    assert list(map_blocks(len, ["ab"] * 3, 1, progress="counting")) == [2] * 3
    assert capfd.readouterr().out == ""


def test_cores_are_counted():
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)


SCRIPT = """
from image_classifier.dataset.workers import map_blocks
for result in map_blocks(eval, {blocks!r}, 10**6, 2):
    print(result, flush=True)
"""
PIDS = SCRIPT.format(blocks=[PID] * 4)


def start(*line: str, **options) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, *line], env=environment, text=True, **pipes, **options)


def as_script(tmp_path: Path, text: str) -> str:
    path = tmp_path / "script.py"  # without a guard: multiprocessing would start it again and again
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("way", ["script", "command", "input"])
def test_workers_start_from_any_main(tmp_path, way):
    line = {"script": [as_script(tmp_path, PIDS)], "command": ["-c", PIDS], "input": ["-"]}[way]
    process = start(*line, cwd=tmp_path)
    out, err = process.communicate(PIDS if way == "input" else None, timeout=60)
    assert process.returncode == 0, err
    assert err == ""
    assert process.pid not in set(map(int, out.split()))


def test_workers_start_in_a_daemonic_process(tmp_path):
    text = f"import multiprocessing\ndef work():\n    exec({PIDS!r})\nif __name__ == '__main__':\n"
    text += "    p = multiprocessing.get_context('spawn').Process(target=work, daemon=True)\n"
    text += "    p.start(); p.join(); raise SystemExit(p.exitcode)\n"
    process = start(as_script(tmp_path, text))
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert len(out.split()) == 4


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM], ids=lambda kill: kill.name)
def test_however_the_caller_ends_the_workers_end(tmp_path, kill):
    line = SCRIPT.format(blocks=[PID, PID, *["__import__('time').sleep(1)"] * 50])
    heed = partial(signal.signal, signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores it
    process = start("-c", line, start_new_session=True, preexec_fn=heed)
    pids = [int(process.stdout.readline()), int(process.stdout.readline())]
    os.killpg(process.pid, kill)  # as the terminal does it: the whole group
    _, err = process.communicate(timeout=60)
    assert all_gone(pids)
    if kill == signal.SIGINT:
        assert err.count("Traceback") == 1  # the caller's own
        assert err.rstrip().endswith("KeyboardInterrupt")
    else:
        assert err == ""


def test_a_partial_with_a_bound_method_can_be_sent():
    assert list(map_blocks(partial(str.replace, "a-b", "-"), ["+", "/"], MANY, 2)) == ["a+b", "a/b"]


def test_workers_see_the_callers_modules(tmp_path, monkeypatch):
    (tmp_path / "only_here.py").write_text("def twice(text):\n    return text * 2\n")
    monkeypatch.syspath_prepend(tmp_path)
    import only_here  # type: ignore[import-not-found]

    assert list(map_blocks(only_here.twice, ["a", "b"], MANY, 2)) == ["aa", "bb"]
    assert workers.MANY == MANY
