from __future__ import annotations

import errno
import pickle

import pytest

from image_classifier import errors
from image_classifier.errors import ClassifierError, DataError, StorageError, UnreadableImage, storage_errors
from image_classifier.text import printable


def test_every_error_is_one_of_ours_and_drawn_in_the_docstring():
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert len(kinds) >= 8
    for kind in kinds:
        assert issubclass(kind, ClassifierError)
        assert kind.__name__ in (errors.__doc__ or "")


def test_an_error_is_one_line_with_what_to_do():
    assert str(DataError("the folder\n is empty", "add   images")) == "the folder is empty: add images"
    assert str(DataError("the folder is empty")) == "the folder is empty"


@pytest.mark.parametrize("error", [DataError("fact", "hint"), UnreadableImage("a b.jpg", "cut short", "delete it")])
def test_errors_cross_processes(error):
    twin = pickle.loads(pickle.dumps(error))
    assert type(twin) is type(error)
    assert str(twin) == str(error)


@pytest.mark.parametrize(
    ("number", "word"),
    [(errno.ENOSPC, "space"), (errno.EDQUOT, "space"), (errno.EACCES, "permission"), (errno.EROFS, "permission")],
)
def test_what_the_disk_refuses_is_a_storage_error(number, word):
    with pytest.raises(StorageError, match=word), storage_errors("x/y"):
        raise OSError(number, "refused")


def test_other_failures_pass():
    with pytest.raises(FileNotFoundError), storage_errors("x/y"):
        raise FileNotFoundError(errno.ENOENT, "not there", "/elsewhere/file")


def test_text_of_strangers_is_always_printable() -> None:
    """Whatever a file name or a request holds: bytes that are not UTF-8, lone surrogates, control characters."""
    shown = printable("a\udc80\ud800\x1b[2J\n\u202eé")
    assert shown == r"a\x80\ud800\x1b[2J\n\u202eé"
    shown.encode("utf-8")
