"""Images as base64: what programs write is read, however it is wrapped; what no program writes is refused."""

from __future__ import annotations

import base64
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from image_classifier.serving import uploads
from image_classifier.serving.uploads import _decode_base64

WRAPS = " \t\r\n"
INSIDE = st.lists(st.tuples(st.integers(0, 10**6), st.text(WRAPS, min_size=1, max_size=3)), max_size=8)


@pytest.fixture(autouse=True, scope="module")
def _small_steps():
    """Several steps for every text, their borders anywhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uploads, "_STEP_BYTES", 8)
        yield


def wrapped(text: str, places: list[tuple[int, str]]) -> str:
    for place, space in places:
        cut = place % (len(text) + 1)
        text = text[:cut] + space + text[cut:]
    return text


@given(st.binary(max_size=100), st.booleans(), INSIDE)
def test_either_alphabet_is_read_wherever_it_is_wrapped(
    content: bytes, url_safe: bool, places: list[tuple[int, str]]
) -> None:
    text = (base64.urlsafe_b64encode if url_safe else base64.b64encode)(content).decode()
    assert _decode_base64(wrapped(text, places)) == content


@given(st.text("AQgw+/-_=\n", max_size=40))
def test_groups_of_four_of_one_alphabet_are_read_and_nothing_else(text: str) -> None:
    plain = text.replace("\n", "")
    alphabet = next(
        (
            some
            for some in (r"\w-", "A-Za-z0-9+/")
            if re.fullmatch(rf"(?a:[{some}]{{4}})*(?a:[{some}]{{2}}==|[{some}]{{3}}=)?", plain)
        ),
        None,
    )
    if alphabet is None:
        with pytest.raises(ValueError, match="."):
            _decode_base64(text)
    else:
        assert _decode_base64(text) == base64.b64decode(plain, altchars=b"-_" if set(plain) & set("-_") else None)


@given(st.binary(min_size=1, max_size=100), st.integers(0, 10**6), st.characters(exclude_characters=WRAPS))
def test_one_strange_character_anywhere_is_refused(content: bytes, place: int, character: str) -> None:
    text = base64.b64encode(content).decode()
    cut = place % (len(text) + 1)
    with pytest.raises(ValueError, match="."):
        _decode_base64(text[:cut] + character + text[cut:])
