"""Images by URL: fetched from public addresses only, within limits, and freed when the request ends."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from socket import create_connection, socket

import pytest

from tests.serving.conftest import Reply, Server, start_server
from tests.serving.internet import SECRET, Site, environment, internet

_SMALL = ("fetch.enabled=true", "limits.max_bytes=100000", "request.max_bytes=50000", "request.max_memory=450000")
_PATIENT = ("fetch.total_s=300", "fetch.timeout_s=300", "request.answer_s=300")


def body_of(*urls: str) -> bytes:
    return json.dumps({"images": [{"url": url} for url in urls]}).encode()


def ask(server: Server, *urls: str, path: str = "/predict") -> Reply:
    return server.ask("POST", path, body_of(*urls), {"Content-Type": "application/json"})


def words_of(reply: Reply) -> str:
    """Return the error of the only image; check that it reveals nothing of the fetched site or the settings."""
    assert reply.status == 422, reply.content
    (only,) = reply.json["predictions"]
    assert sorted(only) == ["error", "path"]
    for untold in (SECRET, b"allow_private_urls", b"root:", b"Traceback", b"\x1b"):
        assert untold not in reply.content
    return str(only["error"])


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture(scope="module")
def site(digit: bytes) -> Iterator[Site]:
    with internet(digit) as found:
        yield found


@pytest.fixture(autouse=True)
def _nobody_asked_yet(site: Site) -> None:
    site.asked.clear()


@pytest.fixture(scope="module")
def fetching(digits_bundle: Path, tmp_path_factory: pytest.TempPathFactory, site: Site) -> Iterator[Server]:
    """A server that fetches, in two seconds or not at all."""
    folder = tmp_path_factory.mktemp("fetching")
    found = start_server(
        folder, digits_bundle, *_SMALL, "fetch.total_s=2", "fetch.timeout_s=1", env=environment(folder, site)
    )
    yield found
    assert found.end() == 0, found.log.read_text()
    assert "Traceback" not in found.log.read_text()


@pytest.fixture
def patient(digits_bundle: Path, tmp_path: Path, site: Site) -> Iterator[Server]:
    """A server that waits for minutes, and ends a second after it was told to."""
    found = start_server(tmp_path, digits_bundle, *_SMALL, *_PATIENT, "drain_s=1", env=environment(tmp_path, site))
    yield found
    found.end(signal.SIGKILL)
    assert "Traceback" not in found.log.read_text()


def test_it_is_off_by_default(server: Server, site: Site) -> None:
    for url in (site.url("/7.png"), site.url("/7.png", "127.0.0.1"), "file:///etc/passwd"):
        for path in ("/predict", "/explain"):
            reply = ask(server, url, path=path)
            assert (reply.status, reply.json["error"]["code"]) == (403, "forbidden")
    assert not site.asked


def test_a_fetched_image_is_answered_as_a_sent_one(fetching: Server, site: Site, digit: bytes) -> None:
    reply = ask(fetching, site.url("/7.png?key=secret"), site.url("/none.png"), site.url("/hops?2"))
    assert reply.status == 200
    one, missing, led = reply.json["predictions"]
    (sent,) = fetching.send("/predict", ("7.png", digit)).json["predictions"]
    assert one["path"] == "7.png" and one["all_predictions"] == pytest.approx(sent["all_predictions"], abs=1e-5)
    assert (
        missing == {"path": "none.png", "error": "the server answers 404 \\x1b[2J gone"}
        and led["predicted_class"] == one["predicted_class"]
    )
    assert {host for host, _ in site.asked} == {"public.example"}
    assert ask(fetching, site.url("/7.png"), path="/explain").status == 200
    assert "secret" not in fetching.log.read_text()
    assert fetching.ask("GET", "/model").json["urls"] is True


PRIVATE = (
    "127.0.0.1 127.1 127.255.255.254 2130706433 0x7f000001 0x7f.1 017700000001 0177.0.0.1 %31%32%37.0.0.1 127。0。0。1 "
    "①②⑦.0.0.1 0 0.0.0.0 "
    "localhost LOCALHOST private.example both.example 10.1.2.3 172.16.0.1 192.168.1.1 169.254.169.254 100.100.100.200 "
    "168.63.129.16 192.0.0.192 "
    "[::1] [::] [::ffff:127.0.0.1] [::ffff:7f00:1] [0:0:0:0:0:ffff:7f00:1] [::127.0.0.1] "
    "[64:ff9b::7f00:1] [2002:7f00:1::] "
    "[::ffff:169.254.169.254] [fe80::1] [fec0::1] [fd00:ec2::254] [ff02::1]"
)


@pytest.mark.parametrize("host", PRIVATE.split())
def test_no_private_address_is_asked(fetching: Server, site: Site, host: str) -> None:
    assert "private network" in words_of(ask(fetching, site.url("/secret", host)))
    assert not site.asked


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "2130706433", "localhost", "private.example", "[::ffff:127.0.0.1]", "both.example"]
)
def test_nor_is_one_that_a_public_address_leads_to(fetching: Server, site: Site, host: str) -> None:
    assert "private network" in words_of(ask(fetching, site.url(f"/to?{site.url('/secret', host)}")))
    assert [name for name, _ in site.asked] == ["public.example"]


def test_the_address_that_was_looked_at_is_the_one_that_is_asked(fetching: Server, site: Site) -> None:
    """The name has another, private address at each second look."""
    url = site.url("/7.png", "turning.example")
    assert ask(fetching, url).status == 200 and site.asked == [("turning.example", "/7.png")]
    assert "private network" in words_of(ask(fetching, url))
    assert len(site.asked) == 1


@pytest.mark.parametrize(
    "where",
    [
        "public.example@127.0.0.1",
        "public.example:80@127.0.0.1",
        "@127.0.0.1",
        ":@127.0.0.1",
        "127.0.0.1\\@public.example",
    ],
)
def test_no_name_stands_before_an_address(fetching: Server, site: Site, where: str) -> None:
    assert words_of(ask(fetching, site.url("/secret", where)))
    assert not site.asked


OTHERS = (
    "file:///etc/passwd ftp://public.example/7.png gopher://127.0.0.1:1/ data:image/png;base64,AAAA "
    "//127.0.0.1/ /etc/passwd http:/127.0.0.1/ a.png"
)


@pytest.mark.parametrize("url", ["", *OTHERS.split()])
def test_nothing_but_http_is_fetched(fetching: Server, site: Site, url: str) -> None:
    assert words_of(ask(fetching, url)) == "not an http:// or https:// address"
    assert not site.asked


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "ftp://public.example/7.png", "data:image/png;base64,AAAA", "gopher://127.0.0.1:1/"]
)
def test_nor_does_a_redirect_lead_to_anything_else(fetching: Server, site: Site, url: str) -> None:
    assert words_of(ask(fetching, site.url(f"/to?{url}")))
    assert len(site.asked) == 1


@pytest.mark.parametrize(
    "url",
    [
        "http://",
        "http://:80/",
        "https://[",
        "http://[::1",
        "http://a:b/",
        "http://public.example:99999/",
        "http://é%00/",
    ],
)
def test_what_is_no_address_is_one_images_error(fetching: Server, url: str) -> None:
    assert words_of(ask(fetching, url))
    assert words_of(ask(fetching, f"http://{'ü' * 99}.example/"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("/none", "answers 404"),
        ("/huge", "larger than"),
        ("/endless", "larger than"),
        ("/cut", "broke off after"),
        ("/loop", "redirect"),
        ("/hops?3", "redirect"),
        ("/drip", "takes longer than 2 s"),
        ("/silent", "takes longer than 2 s"),
        ("/secret?", "not a JPEG"),
    ],
)
def test_what_cannot_be_had_is_one_images_error(fetching: Server, site: Site, path: str, says: str) -> None:
    start = time.monotonic()
    assert says in words_of(ask(fetching, site.url(path)))
    assert time.monotonic() - start < 10


def test_what_comes_with_a_redirect_is_not_read(fetching: Server, site: Site) -> None:
    """It has no end here."""
    assert ask(fetching, site.url("/flood")).status == 200


def test_more_addresses_than_one_request_may_name_are_not_asked(fetching: Server, site: Site) -> None:
    assert ask(fetching, *[site.url("/7.png")] * 9).status == 413 and not site.asked
    assert ask(fetching, *[site.url("/7.png")] * 8).status == 200 and len(site.asked) == 8


def assert_full(reply: Reply) -> None:
    assert (reply.status, reply.json["error"]["code"]) == (503, "queue_full") and "retry-after" in reply.headers


def test_what_is_fetched_counts_as_what_is_sent_until_the_request_is_over(fetching: Server, site: Site) -> None:
    for _ in range(3):
        assert_full(ask(fetching, *[site.url("/large")] * 6))
        assert (
            ask(fetching, *[site.url("/large")] * 4).status == 422
        )  # they are no pictures, but there is room for them
        assert ask(fetching, *[site.url("/huge")] * 8).status == 422


def begin_to_hold(server: Server, site: Site) -> socket:
    """A connection whose request waits for four addresses, which have sent nearly all."""
    connection = create_connection((server.host, server.port), timeout=60)
    body = body_of(*[site.url("/held")] * 4)
    connection.sendall(
        b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        % len(body)
        + body
    )
    until(lambda: site.holding == 4)
    return connection


@pytest.mark.slow
def test_who_leaves_ends_what_was_fetched_for_him(patient: Server, site: Site) -> None:
    with closing(begin_to_hold(patient, site)):
        assert_full(ask(patient, *[site.url("/large")] * 4))
    until(lambda: site.holding == 0)
    assert ask(patient, *[site.url("/large")] * 4).status == 422
    assert '"status": 499' in patient.log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("numbers", [[signal.SIGTERM], [signal.SIGINT, signal.SIGINT]], ids=str)
def test_nothing_that_is_fetched_keeps_the_server_from_its_end(patient: Server, site: Site, numbers: list[int]) -> None:
    with closing(begin_to_hold(patient, site)) as connection:
        for number in numbers:
            patient.process.send_signal(number)
            time.sleep(0.3)
        assert patient.process.wait(30) == (130 if len(numbers) > 1 else 0)
        with suppress(ConnectionError):
            said = connection.recv(2**16)
            assert len(numbers) > 1 or b"503" in said
    until(lambda: site.holding == 0)
