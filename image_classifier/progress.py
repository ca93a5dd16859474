"""A progress bar on standard error."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def with_bar(items: Iterable[T], text: str, total: int) -> Iterator[T]:
    """Yield the items and show a progress bar on standard error if that is a terminal."""
    from rich.console import Console  # imported here: worker processes would load rich for nothing
    from rich.progress import track

    yield from track(items, text, total=total, transient=True, console=Console(stderr=True))
