"""Clients that are slow, silent, gone or too many hold no resources and do not delay the next client."""

from __future__ import annotations

import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import pytest

from tests.serving.siege.attackers import Victim, all_of, form, head, reply_of, until, victim

LIMITS = (
    "request.headers_s=1",
    "request.body_s=1",
    "request.max_connections=100",
    "queue=64",
    "request.max_memory=70000000",
)


@pytest.fixture(scope="module")
def small(digits_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    with victim(tmp_path_factory.mktemp("small"), digits_bundle, *LIMITS) as found:
        yield found


@pytest.fixture(autouse=True)
def _serves_the_next(small: Victim, seven: bytes) -> Iterator[None]:
    yield
    until(lambda: small.gauge("queue_images") == 0, "the queue is empty")
    assert small.predict(seven)["predictions"][0]["predicted_class"]


def opened(small: Victim, count: int, stack: ExitStack, said: bytes = b"") -> list[socket.socket]:
    found = []
    for _ in range(count):
        connection = stack.enter_context(closing(small.connect()))
        with suppress(ConnectionError):
            connection.sendall(said)
        found.append(connection)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"GET /healthz HT",
        head("POST", "/predict", bytes(1000)),
        head("POST", "/predict", bytes(1000)) + bytes(500),
    ],
)
def test_connections_that_say_nothing_more_are_closed(small: Victim, said: bytes) -> None:
    with ExitStack() as stack:
        silent = opened(small, 60, stack, said)
        assert small.ask("/healthz")[0] == 200
        for connection in silent:
            assert reply_of(all_of(connection))[0] in (0, 408)


@pytest.mark.slow
def test_more_connections_than_may_be_are_closed_as_they_come(small: Victim) -> None:
    with ExitStack() as stack:
        crowd = opened(small, 150, stack)
        assert sum(all_of(connection) == b"" for connection in crowd) == 150
    assert small.ask("/healthz")[0] == 200


@pytest.mark.slow
def test_whoever_sends_a_byte_now_and_then_is_told_that_it_takes_too_long(small: Victim) -> None:
    with closing(small.connect()) as slow:
        slow.sendall(head("POST", "/predict", bytes(1000)))
        start = time.monotonic()
        with suppress(ConnectionError):
            while time.monotonic() - start < 10:
                slow.sendall(b"x")
                time.sleep(0.1)
                slow.settimeout(0.001)
                with suppress(TimeoutError):
                    if said := slow.recv(2**16):
                        assert b" 408 " in said.partition(b"\r\n")[0]
                        break
                slow.settimeout(10)
        assert time.monotonic() - start < 9


def test_the_work_of_whoever_leaves_is_given_up(small: Victim, seven: bytes) -> None:
    os.kill(small.model_pids[0], signal.SIGSTOP)
    try:
        with ExitStack() as stack:
            body = form(*[seven] * 4)
            opened(small, 10, stack, head("POST", "/predict", body) + body)
            until(lambda: small.gauge("queue_images") == 40, "all wait")
        until(lambda: small.gauge("queue_images") == 0, "none is counted any more")
        with ExitStack() as stack:  # nor held: the same again, and it would be more than the queue takes
            opened(small, 10, stack, head("POST", "/predict", body) + body)
            until(lambda: small.gauge("queue_images") == 40, "all wait")
    finally:
        os.kill(small.model_pids[0], signal.SIGCONT)
    until(lambda: 499 in {request["status"] for request in small.requests()}, "the log says that they left")


def test_a_full_queue_says_when_to_come_back_and_at_once(small: Victim, seven: bytes) -> None:
    os.kill(small.model_pids[0], signal.SIGSTOP)
    try:
        with ExitStack() as stack:
            body = form(*[seven] * 32)
            waiting = opened(small, 2, stack, head("POST", "/predict", body, more=b"Connection: close\r\n") + body)
            until(lambda: small.gauge("queue_images") == 64, "the queue is full")
            start = time.monotonic()
            status, headers, content = small.ask("/predict", form(seven))
            assert status == 503 and b"queue_full" in content and 1 <= int(headers["retry-after"]) <= 60
            assert time.monotonic() - start < 5 and small.ask("/healthz")[0] == 200
            os.kill(small.model_pids[0], signal.SIGCONT)
            assert [reply_of(all_of(connection))[0] for connection in waiting] == [200, 200]
    finally:
        os.kill(small.model_pids[0], signal.SIGCONT)


def test_bodies_together_have_a_limit_too(small: Victim) -> None:
    with ExitStack() as stack:
        held = head("POST", "/predict", bytes(60_000_000)) + bytes(40_000_000)
        opened(small, 1, stack, held)
        status, headers, content = small.ask("/predict", form(bytes(40_000_000)))
        assert status == 503 and b"bodies" in content and "retry-after" in headers


@pytest.mark.slow
def test_a_body_that_does_not_go_on_gives_way(digits_bundle: Path, tmp_path: Path, seven: bytes) -> None:
    with victim(tmp_path, digits_bundle, "request.max_memory=70000000") as found, ExitStack() as stack:
        (held,) = opened(found, 1, stack, head("POST", "/predict", bytes(60_000_000)) + bytes(59_990_000))
        until(lambda: found.ask("/predict", form(bytes(30_000_000)))[0] == 422, "there is room again", seconds=20)
        status, _, content = reply_of(all_of(held))
        assert status == 408 and b"memory" in content
        assert found.predict(seven)["predictions"]


@pytest.mark.slow
def test_whoever_is_refused_in_the_middle_of_a_large_body_hears_why(digits_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "keys.txt").write_text("0123456789abcdef\n")
    with (
        victim(tmp_path, digits_bundle, "access.keys_file=keys.txt", "request.headers_s=2") as found,
        closing(found.connect()) as connection,
    ):
        sent = threading.Thread(
            target=_send, args=(connection, head("POST", "/predict", bytes(60_000_000)) + bytes(60_000_000))
        )
        sent.start()
        said = b""
        while not said.endswith(b"}"):
            said += connection.recv(2**16)
        status, _, content = reply_of(said)
        sent.join()
        assert status == 401 and b"X-API-Key" in content
        until(lambda: 'route="/predict",status="401"' in _figures(found), "the refusal is counted for its route")


def _send(connection: socket.socket, content: bytes) -> None:
    with suppress(ConnectionError):
        connection.sendall(content)


def _figures(found: Victim) -> str:
    key = b"X-API-Key: 0123456789abcdef\r\nConnection: close\r\n"
    with closing(found.connect()) as connection:
        connection.sendall(head("GET", "/metrics", more=key))
        return all_of(connection).decode()


@pytest.mark.slow
def test_whoever_reads_slowly_gets_all(small: Victim) -> None:
    """Answers of several megabytes, read for longer than one that reads nothing is waited for."""
    with closing(small.connect()) as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**14)
        slow.sendall(head("GET", "/openapi.json") * 199 + head("GET", "/openapi.json", more=b"Connection: close\r\n"))
        slow.settimeout(30)
        said, end = b"", time.monotonic() + 30
        while part := slow.recv(2**15):
            said += part
            if time.monotonic() < end:
                time.sleep(0.5)
        assert said.count(b"HTTP/1.1 200 OK\r\n") == 200


@pytest.mark.slow
def test_whoever_reads_no_answer_is_left_alone(small: Victim) -> None:
    """Answers of megabytes for clients that never read: bounded memory, and in the end the connections are gone."""
    before = small.memory()[0]
    with ExitStack() as stack:
        deaf = opened(small, 40, stack, head("GET", "/openapi.json") * 300)
        for _ in range(10):
            assert small.ask("/healthz")[0] == 200
            time.sleep(0.2)
        assert small.memory()[0] - before < 100
        time.sleep(21)
        with suppress(TimeoutError):
            for connection in deaf:
                connection.settimeout(5)
                all_of(connection)
    assert small.memory()[0] - before < 100


@pytest.mark.slow
def test_thousands_of_connections_on_a_machine_that_allows_few_files(
    digits_bundle: Path, tmp_path: Path, seven: bytes
) -> None:
    def few() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))

    with victim(tmp_path, digits_bundle, "request.headers_s=3", preexec_fn=few) as found, ExitStack() as stack:
        opened(found, 3000, stack)
        time.sleep(5)
        assert found.predict(seven)["predictions"]
        assert not any("system resource" in line for line in found.words()), found.words()[-3:]
