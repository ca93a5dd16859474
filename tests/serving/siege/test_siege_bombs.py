"""Small requests that would cost much, and large ones: refused cheaply, and meanwhile others are answered."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from tests.serving.siege.attackers import FORM, JSON, Victim, form, head, reply_of, victim

M = 2**20
V2 = "/v2/models/digits/infer"


def tensor(data: bytes, rows: int = 1) -> bytes:
    return b'{"inputs":[{"name":"pixels","datatype":"UINT8","shape":[%d,3,32,32],"data":[%s]}]}' % (rows, data)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "kind", "body", "status"),
    [
        ("/predict", JSON, b'{"images":[' + b"{}," * M + b"{}]}", 413),
        ("/predict", JSON, b'{"images":[' + b"1," * M + b"1]}", 413),
        ("/predict", JSON, b'{"images":[' + b"1," * 90_000 + b"1]}", 413),
        ("/predict", JSON, b'{"images":[' + b"1," * 1_000 + b"1]}", 422),
        ("/predict", JSON, b'{"images":[' + b"{}," * 90_000 + b"{}]}", 413),
        ("/predict", JSON, b"{" + b'"a":1,' * M + b'"b":1}', 413),
        ("/predict", JSON, b'{"images":' + b"[" * M, 422),
        (
            "/predict",
            FORM,
            b'--f\r\nContent-Disposition: form-data; name="a"\r\n\r\n\r\n' * 100_000 + b"--f--\r\n",
            400,
        ),
        ("/predict", FORM, b"--f\r\n" + b"X-A: b\r\n" * M, 400),
        ("/predict", FORM, form(*[b"x"] * 10_000), 413),
        (V2, JSON, tensor(b"1," * 3 * M + b"1"), 413),
        (V2, JSON, tensor(b"[]," * M + b"1"), 400),
        (V2, JSON, tensor(b"[]," * M + b"1", 32), 400),
        (V2, JSON, tensor(b"1", 2**62), 400),
        (V2, JSON, b"[" * M, 400),
    ],
    ids=lambda value: f"{len(value)} bytes" if isinstance(value, bytes) else None,
)
def test_a_small_bomb_costs_little(besieged: Victim, path: str, kind: bytes, body: bytes, status: int) -> None:
    before, start = sum(besieged.memory()), time.monotonic()
    found, _, content = besieged.ask(path, body, kind)
    assert found == status and b'"error"' in content, content
    assert time.monotonic() - start < 10  # each took up to a minute once
    assert sum(besieged.memory()) - before < 300


def test_a_body_in_crumbs_is_refused(besieged: Victim) -> None:
    said = besieged.raw(
        head("POST", "/predict", more=FORM + b"Transfer-Encoding: chunked\r\nConnection: close\r\n")
        + b"1\r\nx\r\n" * 200_000
    )
    assert reply_of(said)[0] in (0, 400)


@pytest.fixture(scope="module")
def patient(digits_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    with victim(tmp_path_factory.mktemp("patient"), digits_bundle) as found:
        yield found


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["form", "boundaries", "json"])
def test_others_are_answered_while_a_large_body_is_read(patient: Victim, kind: str) -> None:
    large = {
        "form": (FORM, form(bytes(62 * M))),
        "boundaries": (FORM, form(b"\r\n--g" * (12 * M))),
        "json": (JSON, json.dumps({"images": [{"base64": base64.b64encode(bytes(46 * M)).decode()}]}).encode()),
    }[kind]
    answered = [time.monotonic()]
    statuses: list[int] = []
    sender = threading.Thread(target=lambda: statuses.append(patient.ask("/predict", large[1], large[0])[0]))
    sender.start()
    while sender.is_alive():
        assert patient.ask("/healthz")[0] == 200
        answered.append(time.monotonic())
    sender.join()
    assert statuses == [422] and len(answered) > 5
    assert max(after - before for before, after in pairwise(answered)) < 2  # 50 ms on an idle machine; JSON 130 ms
