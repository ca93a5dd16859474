"""Where the weights that a training starts from come from, and what their licence restricts. It needs no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from image_classifier.bundle import INFO_NAME, sha256_of
from image_classifier.text import listed, printable

SCRATCH, TIMM, TORCHVISION, LIBRARY, FILE, UNKNOWN = "scratch", "timm", "torchvision", "library", "file", "unknown"
_TORCHVISION_PAGE = "https://docs.pytorch.org/vision/stable/models.html"
_MAX_BYTES = 2**26  # of a JSON file beside the weights
_MAX_LENGTH = 300  # characters of a value, which may come from a stranger's file

# Licences in lower case, with "-" for all that is no letter or digit.
_NOT_STATED = ("", "unknown", "none", "not-stated")
_OPEN = re.compile(r"(apache|mit|bsd|isc|cc0|unlicense|public-domain)(-.*)?|cc-by(-\d.*)?")
# amlr: Apple's for research; SWAG's is CC BY-NC 4.0, and torchvision names it by its address.
_NON_COMMERCIAL = re.compile(r"\b(nc|non-?commercial|amlr|research-only|commons-clause|facebookresearch-swag)\b")


@dataclass(frozen=True)
class WeightOrigin:
    """The source of initial weights, as `provenance.initial_weights` of bundle.json keeps it.

    Attributes:
        origin: scratch, timm, torchvision, library (another one), file, or unknown (a bundle that does not say).
        name: Of the weights in the library, or of the file.
        licence: As the source states it; "": it states none.
        url: A page about the weights, or else their address.
        hub_id: Their name at Hugging Face.
        sha256: Of the file.
        bundles: The bundles through which the weights came, the newest first.
    """

    origin: str
    name: str = ""
    licence: str = ""
    url: str = ""
    hub_id: str = ""
    sha256: str = ""
    bundles: tuple[str, ...] = ()

    @property
    def page(self) -> str:
        """The address at which to read more; "" where none is known."""
        return f"https://huggingface.co/{self.hub_id}" if self.hub_id else self.url

    def as_dict(self) -> dict[str, Any]:
        """Return the known values, ready for JSON; weights of others always have a `licence`, null if not stated."""
        known = {key: list(value) if key == "bundles" else value for key, value in asdict(self).items() if value}
        return known if self.origin == SCRATCH else {**known, "licence": self.licence or None}

    @classmethod
    def from_dict(cls, values: Any) -> WeightOrigin | None:
        """Return the origin that `as_dict` wrote; None for any other value, such as that of an older bundle."""
        if not isinstance(values, Mapping) or not _text(values.get("origin")):
            return None
        bundles = values.get("bundles")
        texts = {key: _text(values.get(key)) for key in ("origin", "name", "licence", "url", "hub_id", "sha256")}
        return cls(**texts, bundles=tuple(map(_text, bundles)) if isinstance(bundles, list | tuple) else ())


def library_origin(target: str, config: Mapping[str, Any]) -> WeightOrigin:
    """Return the origin of a library's pretrained weights.

    Args:
        target: The `_target_` that builds the network.
        config: The network's `pretrained_cfg`, with the keys of timm's.
    """
    origin = TIMM if target.startswith("timm.") else TORCHVISION if "torchvision" in target else LIBRARY
    name = ".".join(_text(config[key]) for key in ("architecture", "tag") if config.get(key)) or target
    page = _TORCHVISION_PAGE if origin == TORCHVISION else ""
    url = next((_text(config[key]) for key in ("origin_url", "url") if config.get(key)), page)
    return WeightOrigin(origin, name, _licence(config.get("license")), url, _text(config.get("hf_hub_id")))


def file_origin(path: Path) -> WeightOrigin:
    """Return the origin of a file; its licence is in its safetensors header, or in a JSON file beside it.

    Raises:
        CheckpointError: The file cannot be read.
    """
    licence = _licence_in_header(path) or _licence_beside(path)
    return WeightOrigin(FILE, path.name, licence, sha256=sha256_of(path))


def bundle_origin(name: str, recorded: Any) -> WeightOrigin:
    """Return the origin of a bundle's weights: what it recorded itself as `initial_weights`, and its name."""
    origin = WeightOrigin.from_dict(recorded) or WeightOrigin(UNKNOWN)
    return replace(origin, bundles=(name, *origin.bundles))


def restriction(licence: str) -> str:
    """Return what a licence restricts, in words; "" for an open one, or where none is stated.

    >>> restriction("cc-by-nc-4.0"), restriction("dinov3-license"), restriction("Apache-2.0")
    ('forbids commercial use', 'has terms of its own', '')
    """
    name = _plain(licence)
    if _NON_COMMERCIAL.search(name):
        return "forbids commercial use"
    return "" if name in _NOT_STATED or _OPEN.fullmatch(name) else "has terms of its own"


def weights_in_words(origin: WeightOrigin) -> tuple[str, ...]:
    """Return printable sentences: what the initial weights are, their licence, and what it restricts if it does."""
    source, restricts = printable(_source_in_words(origin)), restriction(origin.licence)
    if not restricts:
        return (source,)
    bound = (
        f"The licence {origin.licence} {restricts}, and a model that is trained from these weights may be bound by it: "
        "read it before the model is used or passed on, or start from other weights."
    )
    return source, printable(bound)


def licence_warning(origin: WeightOrigin) -> str:
    """Return a line about a licence that restricts, for the log; "" for others."""
    source, *bound = weights_in_words(origin)
    return " ".join([source, *bound, *([f"See {printable(origin.page)}"] if origin.page else [])]) if bound else ""


def _source_in_words(origin: WeightOrigin) -> str:
    models = listed(origin.bundles)
    if origin.origin == SCRATCH:
        return f"The training started from {f'the model {models}, which started from ' if models else ''}scratch."
    if origin.origin == UNKNOWN:
        return f"The training started from the model {models}, which does not say where its own weights came from."
    kind = {FILE: "the file ", LIBRARY: "weights of "}.get(origin.origin, f"weights of {origin.origin}, ")
    through = f", by way of the model {models}" if models else ""
    licence = f"licence {origin.licence}" if origin.licence else "licence not stated by the source"
    return f"The training started from {kind}{origin.name}{through} ({licence})."


def _licence_in_header(path: Path) -> str:
    if path.suffix != ".safetensors":
        return ""
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        header = file.metadata() or {}
    return _licence(header.get("license") or header.get("licence"))


def _licence_beside(path: Path) -> str:
    """Return the licence in `config.json`, as at Hugging Face, or in the bundle that the file is in; "" for none."""
    config = _json(path.with_name("config.json"))
    bundle = _mapping(_mapping(_json(path.with_name(INFO_NAME)), "provenance"), "initial_weights")
    stated = (config.get("license"), _mapping(config, "pretrained_cfg").get("license"), bundle.get("licence"))
    return next(filter(None, map(_licence, stated)), "")


def _json(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_bytes()) if path.stat().st_size <= _MAX_BYTES else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _mapping(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = values.get(key)
    return value if isinstance(value, dict) else {}


def _licence(value: Any) -> str:
    text = _text(value)
    return "" if _plain(text) in _NOT_STATED else text


def _plain(licence: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", licence.lower()).strip("-")


def _text(value: Any) -> str:
    """Return a value that is text on one line, which can be written to a file; "" for any other."""
    if not isinstance(value, str):
        return ""
    return " ".join(value.split())[:_MAX_LENGTH].encode(errors="replace").decode()
