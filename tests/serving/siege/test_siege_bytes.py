"""Invalid HTTP gets an answer or a closed connection, little log output, and does not delay the next client."""

from __future__ import annotations

import json
import time
from contextlib import closing

import pytest

from tests.serving.siege.attackers import FORM, JSON, Victim, all_of, form, head, reply_of

HOST = b"Host: localhost\r\n"
CLOSE = HOST + b"Connection: close\r\n"
CHUNKED = b"POST /predict HTTP/1.1\r\n" + CLOSE + FORM + b"Transfer-Encoding: chunked\r\n"


@pytest.fixture(autouse=True)
def _serves_the_next(besieged: Victim, seven: bytes):
    before = len(besieged.words())
    yield
    assert besieged.predict(seven)["predictions"][0]["predicted_class"]
    said = "\n".join(besieged.words()[before:])
    assert not any(word in said for word in ("Traceback", "Fatal", "uvicorn")), said


@pytest.mark.parametrize("number", [2**63, 10**40])
def test_more_classes_than_can_be_counted_are_all_of_them(besieged: Victim, seven: bytes, number: int) -> None:
    assert len(besieged.predict(seven, f"/predict?top_k={number}")["predictions"][0]["all_predictions"]) == 10
    asked = json.dumps({"images": [{"base64": ""}], "top_k": number}).encode()
    assert besieged.ask("/predict", asked, JSON)[0] == 422


@pytest.mark.parametrize(
    "length", [b"-1", b"+5", b"5, 6", b"0x5", b"5\r\nContent-Length: 6", b"9" * 25, b"9" * 5000, b"\xb2", b""]
)
def test_a_length_that_is_none_is_refused(besieged: Victim, length: bytes) -> None:
    reply = reply_of(
        besieged.raw(b"POST /predict HTTP/1.1\r\n" + CLOSE + FORM + b"Content-Length: " + length + b"\r\n\r\nhello")
    )
    assert reply[0] in (400, 413)


def test_a_length_beside_chunks_is_refused(besieged: Victim, seven: bytes) -> None:
    """A proxy in front that believes the other of the two would see a second request in the body, or none."""
    body = form(seven)
    chunks = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    kept = CHUNKED.replace(b"Connection: close\r\n", b"")
    said = besieged.raw(kept + b"Content-Length: 5\r\n\r\n" + chunks + head("GET", "/healthz"))
    assert reply_of(said)[0] == 400 and said.count(b"HTTP/1.1 ") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "coding",
    [b"xchunked", b"chunked, identity", b"identity", b"gzip, chunked", b"chunked\r\nTransfer-Encoding: chunked"],
)
def test_other_codings_of_a_body_are_refused(besieged: Victim, coding: bytes) -> None:
    assert reply_of(
        besieged.raw(b"POST /predict HTTP/1.1\r\n" + CLOSE + b"Transfer-Encoding: " + coding + b"\r\n\r\n0\r\n\r\n")
    )[0] in (400, 501)


@pytest.mark.parametrize("chunk", [b"F" * 30, b"-1", b"0x5", b"", b"5 5", b"\x00", b"G"])
def test_a_chunk_of_no_size_is_refused(besieged: Victim, chunk: bytes) -> None:
    assert reply_of(besieged.raw(CHUNKED + b"\r\n" + chunk + b"\r\nhello\r\n0\r\n\r\n"))[0] == 400


@pytest.mark.slow
@pytest.mark.parametrize(
    "chunk", [b"F" * 18 + b"\r\nxx", b"5;" + b"x" * 70_000, b"5;", b"0\r\n" + b"a: b\r\n" * 20_000]
)
def test_a_chunk_that_never_ends_is_cut_off(besieged: Victim, chunk: bytes) -> None:
    assert reply_of(besieged.raw(CHUNKED + b"\r\n" + chunk))[0] in (400, 408, 413)


def test_a_body_that_breaks_after_its_answer_ends_the_connection(besieged: Victim) -> None:
    with closing(besieged.connect()) as connection:
        connection.sendall(
            b"POST /predict HTTP/1.1\r\nHost: evil.example\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"
        )
        answer = b""
        while b'"request_id"' not in answer:  # its head and its content may come one after the other
            answer += connection.recv(2**16)
        assert b" 403 " in answer
        connection.sendall(b"nonsense\r\n")
        assert all_of(connection) == b""


@pytest.mark.parametrize(
    "request_line",
    [
        b"GET /\xc3\xa9 HTTP/1.1",
        b"GET /a\0b HTTP/1.1",
        b"GET /healthz",
        b"GET  /healthz HTTP/1.1",
        b"/healthz GET HTTP/1.1",
        b"GET /healthz HTTP/one",
        b"PRI * HTTP/2.0",
        b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03",
        b"\0" * 100_000,
        b"",
        b"A" * 100_000,
    ],
)
def test_what_is_no_request_gets_400_or_nothing(besieged: Victim, request_line: bytes) -> None:
    assert reply_of(besieged.raw(request_line + b"\r\n" + b"Connection: close\r\n\r\nSM\r\n\r\n"))[0] in (0, 400, 403)


@pytest.mark.parametrize(
    "path",
    [
        "/page/%00",
        "/page/" + "a" * 3000,
        "/page/" + "a/" * 2000,
        "/page/../app.py",
        "/page/%2e%2e/app.py",
        "/page//etc/passwd",
    ],
)
def test_no_path_is_too_odd_for_the_page(besieged: Victim, path: str) -> None:
    assert besieged.ask(path)[0] == 404


@pytest.mark.parametrize(
    "lines",
    [b"X: " + b"a" * 300_000, b"\r\n".join([b"X: a"] * 60_000), b"X: a\0b", b"X : a", b"Host: other", b": a", b"X"],
)
def test_a_head_that_is_none_is_refused(besieged: Victim, lines: bytes) -> None:
    assert reply_of(besieged.raw(b"GET /healthz HTTP/1.1\r\n" + CLOSE + lines + b"\r\n\r\n"))[0] in (0, 400, 431)


@pytest.mark.parametrize(
    "upgrade",
    [
        b"websocket\r\nSec-WebSocket-Key: x\r\nSec-WebSocket-Version: 13",
        b"h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA",
    ],
)
def test_another_protocol_is_not_taken_up(besieged: Victim, upgrade: bytes) -> None:
    asked = b"GET /healthz HTTP/1.1\r\n" + HOST + b"Connection: Upgrade, close\r\nUpgrade: " + upgrade + b"\r\n\r\n"
    status, _, content = reply_of(besieged.raw(asked))
    assert (status, content) == (200, b'{"status":"alive"}')


def test_old_and_careful_clients_are_served(besieged: Victim, seven: bytes) -> None:
    assert reply_of(besieged.raw(b"GET /healthz HTTP/1.0\r\n" + HOST + b"\r\n"))[0] == 200
    with closing(besieged.connect()) as connection:
        connection.sendall(head("POST", "/predict", form(seven), more=b"Expect: 100-continue\r\nConnection: close\r\n"))
        assert connection.recv(2**16).startswith(b"HTTP/1.1 100 ")
        connection.sendall(form(seven))
        assert reply_of(all_of(connection))[0] == 200


def test_whoever_may_not_ask_is_told_before_the_body_is_sent(besieged: Victim, seven: bytes) -> None:
    request = head("POST", "/predict", form(seven), more=b"Expect: 100-continue\r\n").replace(
        b"localhost", b"evil.example"
    )
    with closing(besieged.connect()) as connection:
        connection.sendall(request)
        assert connection.recv(2**16).startswith(b"HTTP/1.1 403 ")


def test_requests_that_come_at_once_are_answered_in_their_order(besieged: Victim, seven: bytes) -> None:
    body = form(seven)
    one = head("POST", "/predict", body) + body
    said = besieged.raw(one * 9 + head("GET", "/nothing") + head("GET", "/healthz", more=b"Connection: close\r\n"))
    statuses = [int(part[:3]) for part in said.split(b"HTTP/1.1 ")[1:]]
    assert statuses == [200] * 9 + [404, 200]


@pytest.mark.parametrize("path", ["/healthz", "/models", "/readyz"])
def test_head_is_get_without_the_content(besieged: Victim, path: str) -> None:
    status, headers, content = besieged.ask(path, method="HEAD")
    assert (status, content) == (200, b"") and int(headers["content-length"]) > 0


@pytest.mark.slow
def test_an_answer_waits_for_nobody_who_sends_a_byte_a_second(besieged: Victim) -> None:
    with closing(besieged.connect()) as slow:
        start = time.monotonic()
        for byte in b"GET /healthz HTTP/1.1\r\n" * 2:
            try:
                slow.sendall(bytes([byte]))
            except ConnectionError:
                break
            time.sleep(0.3)
        assert time.monotonic() - start < 10  # request.headers_s=2


@pytest.mark.parametrize(
    ("said", "status"),
    [
        (b"Origin: http://localhost\r\n", 200),
        (b"Origin: http://evil.example\r\n", 403),
        (b"Origin: null\r\n", 403),
        (b"Origin: http://localhost.evil.example\r\n", 403),
        (b"Origin: https://proxied.example\r\nSec-Fetch-Site: same-origin\r\n", 200),
        (b"Origin: http://localhost\r\nSec-Fetch-Site: cross-site\r\n", 403),
    ],
)
def test_a_page_of_another_site_is_known_by_its_origin_too(
    besieged: Victim, seven: bytes, said: bytes, status: int
) -> None:
    """Over plain HTTP to another machine browsers send no Sec-Fetch-Site."""
    assert besieged.ask("/predict", form(seven), more=said)[0] == status
