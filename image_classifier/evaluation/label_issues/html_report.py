"""The suspects as one page: look at each image, decide, and save the decisions as fix.csv."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from image_classifier.evaluation.label_issues.ranking import Suspect
from image_classifier.html.document import render as render_page
from image_classifier.html.text import plain
from image_classifier.html.thumbnails import BUDGET, Thumbnail, thumbnail
from image_classifier.images import DEFAULT_LIMITS, WHITE, DecodeLimits
from image_classifier.manifest import ENCODING

_MARKUP = 2_500  # characters of HTML around one image
_WORKERS = 4
_BATCH = 32  # images decoded before the size is checked again
_MAX_REASONS = 6  # reasons that are counted at the top
_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Row:
    """A suspect's row of fix.csv, as the page returns it."""

    path: str
    label: str
    action: str
    reason: str


@dataclass(frozen=True)
class Gallery:
    """The content of the page besides its cards.

    Args:
        root: The folder that paths are relative to.
        fix_path: Path of fix.csv.
        num_images: Number of images that were checked.
        classes: All class names, to choose from.
        rows: Path -> row of each suspect that a person may decide on.
        decided: Header and decided rows of the existing fix.csv; the saved file keeps them.
        num_decided: Number of these rows.
    """

    root: Path
    fix_path: Path
    num_images: int
    classes: Sequence[str]
    rows: Mapping[str, Row]
    decided: str
    num_decided: int


@dataclass(frozen=True)
class _Card:
    rank: int
    suspect: Suspect
    picture: Thumbnail
    row: Row | None


def render(
    suspects: Sequence[Suspect],
    gallery: Gallery,
    max_suspects: int,
    limits: DecodeLimits = DEFAULT_LIMITS,
    background: tuple[int, int, int] = WHITE,
) -> str:
    """Return the page as HTML below 10 MB, with at most `max_suspects` suspects."""
    counts = Counter(reason for suspect in suspects for reason in suspect.reasons)
    return render_page(
        _HERE / "suspects.html.j2",
        _HERE / "suspects.css",
        _HERE / "suspects.js",
        name=plain(gallery.root.resolve().name or str(gallery.root)),
        root=str(gallery.root),
        fix_path=str(gallery.fix_path),
        num_images=gallery.num_images,
        total=len(suspects),
        reasons=counts.most_common(_MAX_REASONS),
        decided=gallery.num_decided,
        decided_rows=base64.b64encode(gallery.decided.encode(*ENCODING)).decode(),
        delimiter=";" if ";" in gallery.decided.partition("\n")[0] else ",",
        classes=[label for label in gallery.classes if _is_text(label)],
        cards=list(_cards(suspects[:max_suspects], gallery, partial(_drawn, gallery.root, limits, background))),
    )


def _cards(suspects: Sequence[Suspect], gallery: Gallery, draw: partial[Thumbnail]) -> Iterator[_Card]:
    spent = 0
    with ThreadPoolExecutor(_WORKERS) as pool:
        for start in range(0, len(suspects), _BATCH):
            batch = suspects[start : start + _BATCH]
            for rank, (suspect, picture) in enumerate(zip(batch, pool.map(draw, batch), strict=True), start=start + 1):
                spent += len(picture.address) + 3 * len(suspect.path) + _MARKUP
                if spent > BUDGET:
                    return
                row = gallery.rows.get(suspect.path)
                editable = row is not None and all(map(_is_text, (row.path, row.label, row.reason)))
                yield _Card(rank, suspect, picture, row if editable else None)


def _drawn(root: Path, limits: DecodeLimits, background: tuple[int, int, int], suspect: Suspect) -> Thumbnail:
    return thumbnail(root / suspect.path, limits, background)


def _is_text(text: str) -> bool:
    """Return whether a browser returns the text unchanged."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\r" not in text and "\0" not in text
