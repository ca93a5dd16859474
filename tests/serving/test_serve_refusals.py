"""What the server does not take: each refusal has its status, one shape, and costs nobody else anything."""

from __future__ import annotations

import json
import socket
import time
from contextlib import closing, suppress

import pytest

from tests.serving.conftest import KEY, Server, form

WITH_KEY = {"X-API-Key": KEY}


def raw(server: Server, content: bytes, timeout_s: float = 20) -> bytes:
    """What the server says to these bytes until it closes."""
    with closing(socket.create_connection((server.host, server.port), timeout=timeout_s)) as connection:
        connection.sendall(content)
        parts = []
        while part := connection.recv(65536):
            parts.append(part)
        return b"".join(parts)


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status", "code"),
    [
        ("GET", "/nothing", None, {}, 404, "not_found"),
        ("GET", "/predict", None, {}, 405, "method_not_allowed"),
        ("GET", "/model?model=other", None, {}, 404, "not_found"),
        ("POST", "/predict?model=other", b"", {}, 404, "not_found"),
        ("POST", "/predict", b"", {}, 415, "unsupported_media_type"),
        ("POST", "/predict", b"x", {"Content-Type": "image/png"}, 415, "unsupported_media_type"),
        (
            "POST",
            "/predict",
            b"x",
            {"Content-Type": "application/json", "Content-Encoding": "gzip"},
            415,
            "unsupported_media_type",
        ),
        ("POST", "/predict", b"x", {"Content-Type": "multipart/form-data"}, 400, "bad_request"),
        ("POST", "/predict", b"x", {"Content-Type": "multipart/form-data; boundary=frontier"}, 400, "bad_request"),
        ("POST", "/predict", b"--f\r\n\r\n", {"Content-Type": "multipart/form-data; boundary=f"}, 400, "bad_request"),
        ("POST", "/predict", b"{", {"Content-Type": "application/json"}, 422, "invalid"),
        ("POST", "/predict", b"[" * 100_000, {"Content-Type": "application/json"}, 422, "invalid"),
        ("POST", "/predict", b'{"images": []}', {"Content-Type": "application/json"}, 422, "invalid"),
        ("POST", "/predict", b'{"images": [{}]}', {"Content-Type": "application/json"}, 422, "invalid"),
        (
            "POST",
            "/predict",
            b'{"images": [{"path": "/etc/passwd"}]}',
            {"Content-Type": "application/json"},
            422,
            "invalid",
        ),
        (
            "POST",
            "/predict",
            b'{"images": [{"url": "http://127.0.0.1/"}]}',
            {"Content-Type": "application/json"},
            403,
            "forbidden",
        ),
        ("POST", "/predict?top_k=0", b"", {}, 422, "invalid"),
        ("POST", "/predict?topk=3", b"", {}, 422, "invalid"),
        ("POST", "/explain?top_k=3", b"", {}, 422, "invalid"),
        ("GET", "/model?name=digits", None, {}, 422, "invalid"),
        ("GET", "/models", None, {"Host": "evil.example"}, 403, "forbidden"),
        ("POST", "/predict", b"", {"Sec-Fetch-Site": "cross-site"}, 403, "forbidden"),
    ],
)
def test_a_refusal_has_one_shape(server: Server, method, path, body, headers, status, code) -> None:
    reply = server.ask(method, path, body, headers)
    assert (reply.status, reply.json["error"]["code"]) == (status, code), reply.content
    assert reply.json["error"]["message"] and reply.json["request_id"] == reply.headers["x-request-id"]
    assert (
        reply.headers["content-security-policy"].startswith("default-src 'none'")
        and reply.headers["x-content-type-options"] == "nosniff"
    )


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("topk", "3", "unknown form field 'topk': a form has files (images=@FILE) and the text top_k"),
        ("images", "photo.jpg", "unknown form field 'images'"),
        ("a\x1b[2J", "3", "a\\x1b[2J"),
        ("top_k", "0", "top_k must be"),
        ("top_k", "many", "top_k must be"),
        ("top_k", "", "top_k must be"),
    ],
)
def test_a_text_in_a_form_that_means_nothing_is_refused(
    server: Server, digit: bytes, name: str, text: str, words: str
) -> None:
    reply = server.send("/predict", ("7.png", digit), texts={name: text})
    assert (reply.status, reply.json["error"]["code"]) == (422, "invalid") and words in reply.json["error"][
        "message"
    ], reply.content


def test_a_key_of_a_query_that_is_not_known_is_named_with_those_that_are(server: Server, digit: bytes) -> None:
    said = [
        server.send(path, ("7.png", digit)).json["error"]["message"]
        for path in ("/predict?top_k=3&topk=3", "/explain?Class=7")
    ]
    assert said == [
        "unknown query parameter 'topk': this path has model and top_k",
        "unknown query parameter 'Class': this path has model and class",
    ]
    assert server.ask("GET", "/healthz?now=1").status == server.ask("GET", "/?from=mail").status == 200


@pytest.mark.parametrize("path", ["/", "/healthz", "/models", "/predict", "/nothing", "/openapi.json"])
def test_no_answer_lacks_what_browsers_must_be_told(server: Server, path: str) -> None:
    headers = server.ask("GET", path).headers
    assert {
        "content-security-policy",
        "x-content-type-options",
        "referrer-policy",
        "x-request-id",
        "cache-control",
    } <= set(headers)
    assert "server" not in headers and "access-control-allow-origin" not in headers


def test_no_path_leads_out_of_the_pages_folder(server: Server) -> None:
    for path in (
        "/page/../app.py",
        "/page/..%2fapp.py",
        "/page/%2e%2e/app.py",
        "/page//etc/passwd",
        "/page/..\\app.py",
    ):
        assert server.ask("GET", path).status in (403, 404), path


def test_a_key_is_needed_where_there_are_keys(strict: Server, digit: bytes) -> None:
    for headers in (
        {},
        {"X-API-Key": "wrong"},
        {"X-API-Key": KEY[:-1]},
        {"Authorization": f"Basic {KEY}"},
        {"X-API-Key": ""},
    ):
        reply = strict.send("/predict", ("7.png", digit), headers=headers)
        assert (
            reply.status == 401
            and reply.json["error"]["code"] == "unauthorized"
            and "www-authenticate" in reply.headers
        )
    for headers in (WITH_KEY, {"Authorization": f"Bearer {KEY}"}, {"X-API-Key": "another-key-0123456789"}):
        assert strict.send("/predict", ("7.png", digit), headers=headers).status == 200
    assert (
        strict.ask("GET", "/metrics").status
        == strict.ask("GET", "/model").status
        == strict.ask("GET", "/v2").status
        == 401
    )
    assert strict.ask("GET", "/healthz").status == strict.ask("GET", "/readyz").status == 200
    assert KEY not in strict.log.read_text()


def test_an_allowed_site_may_ask_and_no_other(strict: Server, digit: bytes) -> None:
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-api-key"}
    allowed = strict.ask("OPTIONS", "/predict", None, {"Origin": "https://example.org", **asked})
    assert allowed.status == 200 and allowed.headers["access-control-allow-origin"] == "https://example.org"
    assert (
        "access-control-allow-origin"
        not in strict.ask("OPTIONS", "/predict", None, {"Origin": "https://evil.example", **asked}).headers
    )
    site = {"Sec-Fetch-Site": "cross-site", **WITH_KEY}
    assert strict.send("/predict", ("7.png", digit), headers={"Origin": "https://example.org", **site}).status == 200
    assert strict.send("/predict", ("7.png", digit), headers={"Origin": "https://evil.example", **site}).status == 403
    refused = strict.send("/predict", ("7.png", digit), headers={"Origin": "https://example.org"})
    assert refused.status == 401  # its page may read why
    assert refused.headers["access-control-allow-origin"] == "https://example.org"
    assert "retry-after" in refused.headers["access-control-expose-headers"]


@pytest.mark.slow
def test_too_much_is_refused_before_it_is_taken(strict: Server, digit: bytes) -> None:
    body, kind = form(("large.png", bytes(30_000)))
    told = strict.ask("POST", "/predict", body, {"Content-Type": kind, **WITH_KEY})
    assert (told.status, told.json["error"]["code"], told.headers["connection"]) == (413, "too_large", "close")
    chunks = b"".join(b"1000\r\n" + bytes(4096) + b"\r\n" for _ in range(8)) + b"0\r\n\r\n"
    start = f"POST /predict HTTP/1.1\r\nHost: localhost\r\nX-API-Key: {KEY}\r\n"
    head = f"{start}Content-Type: {kind}\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    assert raw(strict, head + chunks).startswith(b"HTTP/1.1 413 ")
    head = f"{start}Content-Length: 99999999999999999999\r\n\r\n".encode()
    assert raw(strict, head).startswith(b"HTTP/1.1 413 ")
    assert strict.send("/predict", *[(f"{place}.png", digit) for place in range(4)], headers=WITH_KEY).status == 413


def test_what_the_card_says_an_image_may_have_fits_into_a_request(strict: Server) -> None:
    most = strict.ask("GET", "/model", headers=WITH_KEY).json["limits"]["max_bytes"]
    assert (
        strict.send("/predict", (f"{'long' * 50}.png", bytes(most)), headers=WITH_KEY).status == 422
    )  # no picture, but it was taken
    assert strict.send("/predict", ("7.png", bytes(most + 1024)), headers=WITH_KEY).status == 413


def test_too_many_pixels_and_other_formats_are_unreadable(strict: Server) -> None:
    import io

    from PIL import Image

    for size, kind, words in (
        ((200, 200), "PNG", "more than the 10,000 allowed"),
        ((10, 10), "GIF", "not a JPEG or PNG image"),
    ):
        buffer = io.BytesIO()
        Image.new("RGB", size).save(buffer, kind)
        reply = strict.send("/predict", ("image.png", buffer.getvalue()), headers=WITH_KEY)
        assert reply.status == 422 and words in reply.json["predictions"][0]["error"]


@pytest.mark.slow
def test_a_body_that_never_ends_is_cut_off(strict: Server, digit: bytes) -> None:
    body, kind = form(("7.png", digit))
    start = f"POST /predict HTTP/1.1\r\nHost: localhost\r\nX-API-Key: {KEY}\r\n"
    head = f"{start}Content-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    assert raw(strict, head + body[:50]).startswith(b"HTTP/1.1 408 ")
    assert strict.send("/predict", ("7.png", digit), headers=WITH_KEY).status == 200


GET = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"
POST = b"POST /predict HTTP/1.1\r\nHost: localhost\r\n"


@pytest.mark.slow
@pytest.mark.parametrize("begun", [b"", b"G", GET, GET + b"\r\nGET /he"])
def test_a_head_that_never_ends_is_cut_off(strict: Server, begun: bytes) -> None:
    start = time.monotonic()
    with suppress(ConnectionError):
        raw(strict, begun)
    assert time.monotonic() - start < 15
    assert strict.ask("GET", "/healthz").status == 200


@pytest.mark.parametrize(
    "nonsense",
    [
        b"\x00" * 100 + b"\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        GET + b"X: " + b"a" * 100_000 + b"\r\n\r\n",
        POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /evil HTTP/1.1\r\n\r\n",
        POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        b"HEAD / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
    ],
)
def test_what_is_no_http_gets_a_400_or_nothing(strict: Server, nonsense: bytes) -> None:
    try:
        found = raw(strict, nonsense)
    except ConnectionError:
        found = b""
    assert not found or found.split(b" ", 2)[1] in (b"200", b"400", b"401", b"403", b"431"), found[:200]
    assert (
        not found
        or found.split(b" ", 2)[1] != b"400"
        or nonsense.startswith(b"HEAD")
        or b'{"error": {"code": "bad_request"' in found
    )
    assert not found or (b"content-security-policy" in found and b"x-request-id" in found)
    assert strict.ask("GET", "/healthz").json == {"status": "alive"}


@pytest.mark.slow
def test_a_client_that_asks_too_often_is_told_when_to_come_back(digits_bundle, tmp_path) -> None:
    from tests.serving.conftest import start_server

    server = start_server(tmp_path, digits_bundle, "access.per_minute=6", "access.burst=2", "request_log=false")
    try:
        statuses = [server.ask("GET", "/models").status for _ in range(3)]
        assert statuses == [200, 200, 429]
        late = server.ask("GET", "/models")
        assert (
            1 <= int(late.headers["retry-after"]) <= 10 and json.loads(late.content)["error"]["code"] == "rate_limited"
        )
        assert server.ask("GET", "/healthz").status == 200
    finally:
        assert server.end() == 0
