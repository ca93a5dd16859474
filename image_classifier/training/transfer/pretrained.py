"""Which pretrained network a run can start from: a file's, one in a library's cache, or one that can be downloaded."""

from __future__ import annotations

import logging
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import getproxies

import torch
from torch import nn

from image_classifier.bundle import sha256_of
from image_classifier.errors import CheckpointError, ClassifierError, ConfigError, SourceError
from image_classifier.modeling.weights import Tensors, read_weights
from image_classifier.override_grammar import quoted
from image_classifier.program import program
from image_classifier.sources.download import Download
from image_classifier.text import similar

log = logging.getLogger(__name__)

_TIMM = "model=timm"
_TORCHVISION = "model=torchvision"
_WEIGHTS_FILE = "model.safetensors"  # of timm's networks at Hugging Face
_TIMEOUT_S = 5.0
_MAX_TRIED = 12  # networks of a library that are built to compare with a file


@dataclass(frozen=True)
class Pretrained:
    """A network with weights: the overrides that choose it, and where the weights come from, in words."""

    overrides: tuple[str, ...]
    name: str
    origin: str


@dataclass(frozen=True)
class _Known:
    """A network of timm or torchvision, by its name there."""

    library: str
    name: str

    @property
    def overrides(self) -> tuple[str, ...]:
        if self.library == "timm":
            return _TIMM, f"model.backbone.model_name={self.name}", "model.backbone.pretrained=true"
        return _TORCHVISION, f"model.backbone.name={self.name}", "model.backbone.weights=DEFAULT"


# The first that can be had is taken. On a processor a step must be cheap; on a GPU accuracy counts, as their libraries
# state it (it was not measured here). All are free to use (Apache-2.0 or BSD-3).
_ON_CPU = (
    _Known("timm", "mobilenetv3_large_100.ra_in1k"),
    _Known("timm", "efficientnet_b0.ra_in1k"),
    _Known("torchvision", "mobilenet_v3_large"),
    _Known("torchvision", "mobilenet_v2"),
    _Known("timm", "mobilenetv2_100.ra_in1k"),
    _Known("torchvision", "efficientnet_b0"),
    _Known("torchvision", "resnet18"),
    _Known("timm", "resnet50.a1_in1k"),
    _Known("torchvision", "resnet50"),
)
_ON_GPU = (
    _Known("timm", "convnext_tiny.in12k_ft_in1k"),
    _Known("torchvision", "convnext_tiny"),
    _Known("timm", "resnet50.a1_in1k"),
    _Known("torchvision", "resnet50"),
    *_ON_CPU,
)


def network_of_file(path: str) -> Pretrained:
    """Return the network of torchvision or timm that a file of weights belongs to, by the names and shapes in it.

    Networks whose name is like the file's come first.

    Raises:
        CheckpointError: There is no such file, or it is damaged.
        ConfigError: No network of torchvision fits.
    """
    tensors = _without_prefix(read_weights(Path(path).expanduser()))
    for library, name in _candidates(Path(path)):
        if _fits(library, name, tensors):
            key = "model_name" if library == "timm" else "name"
            return Pretrained(
                (f"model={library}", f"model.backbone.{key}={name}", f"model.weights={quoted(path)}"), name, path
            )
    raise ConfigError(
        f"cannot tell which network the weights in {path!r} belong to",
        "name it: model=torchvision model.backbone.name=NAME, or model=timm model.backbone.model_name=NAME",
    )


def _candidates(path: Path) -> Iterator[tuple[str, str]]:
    """Yield networks to compare with a file: those named like it first, then all of torchvision."""
    from torchvision import models

    torchvision_names = models.list_models(module=models)
    # "mobilenet_v2-imagenet" -> "mobilenet_v2"; a file called model.safetensors has its folder's name.
    stem = path.stem if path.stem not in ("model", "pytorch_model", "weights") else path.resolve().parent.name
    named = re.split(r"[-.](?=[a-z0-9]+$|imagenet)", stem.lower())[0]
    yield from (("torchvision", name) for name in similar(named, torchvision_names)[:3])
    import timm  # only now: it takes a second

    yield from (("timm", name) for name in similar(stem.lower(), timm.list_models())[:_MAX_TRIED])
    yield from (("torchvision", name) for name in torchvision_names)


def _fits(library: str, name: str, tensors: Tensors) -> bool:
    """Return whether a network has just these tensors, its classifier aside; it is built without memory for numbers."""
    try:
        with torch.device("meta"):
            network = _build(library, name)
    except Exception:  # a few networks cannot be built so; they are not this one
        return False
    expected, found = _without_counters(network.state_dict()), _without_counters(tensors)
    shared = [key for key, value in expected.items() if key in found and value.shape == found[key].shape]
    # The classifier, a weight and a bias, may have other classes.
    return len(shared) >= len(expected) - 2 and len(found) <= len(expected)


def _without_counters(tensors: Tensors) -> Tensors:
    """Return tensors without the counters of batch normalisation, which a file may lack."""
    return {key: value for key, value in tensors.items() if not key.endswith("num_batches_tracked")}


def _without_prefix(tensors: Tensors) -> Tensors:
    """Return tensors without what a wrapper has put before all their names, such as `module.`."""
    # What the first and the last name have in common in alphabetical order, all have.
    parts = zip(min(tensors).split("."), max(tensors).split("."), strict=False)
    prefix = "".join(f"{one}." for one, _ in takewhile(lambda pair: pair[0] == pair[1], parts))
    return {key.removeprefix(prefix): value for key, value in tensors.items()}


def _build(library: str, name: str) -> nn.Module:
    if library == "timm":
        import timm

        return timm.create_model(name)
    from torchvision import models

    network: nn.Module = models.get_model(name)
    return network


def network_of_hub(on_gpu: bool) -> Pretrained | str:
    """Return the best network whose weights are in a cache or can be downloaded, else in one line why there is none."""
    known = _ON_GPU if on_gpu else _ON_CPU
    for one in known:
        if _is_cached(one):
            return Pretrained(one.overrides, one.name, f"in the cache of {one.library}")
    wanted = known[0], next(one for one in known if one.library == "torchvision")
    reasons = []
    for one in wanted:
        try:
            _download(one)
        except CheckpointError as error:
            reasons.append(error.fact)
        else:
            return Pretrained(one.overrides, one.name, f"downloaded by {one.library}")
    return reasons[0]


def fetching_command(on_gpu: bool) -> str:
    """Return the command that fetches the weights where there is a network.

    >>> fetching_command(on_gpu=False).split()[-4:-1]
    ['train', 'FOLDER', 'model=timm']
    """
    wanted = " ".join(word for word in (_ON_GPU if on_gpu else _ON_CPU)[0].overrides if "pretrained" not in word)
    return f"{program()} train FOLDER {wanted}"


def _is_cached(one: _Known) -> bool:
    if one.library == "timm":
        from huggingface_hub import try_to_load_from_cache

        return isinstance(try_to_load_from_cache(f"timm/{one.name}", _WEIGHTS_FILE), str)
    return (Path(torch.hub.get_dir()) / "checkpoints" / _file_name(one)).is_file()


def _file_name(one: _Known) -> str:
    return Path(urlparse(_url(one)).path).name


def _url(one: _Known) -> str:
    from torchvision import models

    return str(models.get_model_weights(one.name)["DEFAULT"].url)


def _download(one: _Known) -> None:
    """Fetch the weights into the library's own cache, resumed where a download broke off.

    Raises:
        CheckpointError: There is no network, the weights are gated, or the disk refuses.
    """
    try:
        if one.library == "timm":
            _download_from_hub(one.name)
        else:
            url = _url(one)
            _check_reachable(url)
            path = Download(url, Path(torch.hub.get_dir()) / "checkpoints" / _file_name(one), attempts=2)()
            # torchvision's file names end with the first digits of their sha256.
            if not sha256_of(path).startswith(path.stem.rpartition("-")[2]):
                path.unlink()
                raise SourceError(f"{url} is not the file that its name promises", "fetch it again")
    except ClassifierError as error:
        raise CheckpointError(f"the weights of {one.name} cannot be had: {error.fact}", error.hint) from error


def _download_from_hub(name: str) -> None:
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import GatedRepoError, HTTPError, LocalEntryNotFoundError  # type: ignore[attr-defined]

    _check_reachable(constants.ENDPOINT)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it logs each of its attempts
    hint = "check the connection, or give a file with model.weights=PATH"
    try:
        hf_hub_download(f"timm/{name}", _WEIGHTS_FILE, etag_timeout=_TIMEOUT_S)
    except GatedRepoError as error:
        raise SourceError(
            "they are gated", f"accept the licence at https://huggingface.co/timm/{name}, then run `hf auth login`"
        ) from error
    except (LocalEntryNotFoundError, HTTPError, OSError) as error:
        reason = " ".join(str(error).split()).partition(". ")[0][:120]
        raise SourceError(
            f"no network ({reason})" if isinstance(error, LocalEntryNotFoundError) else reason, hint
        ) from error


def _check_reachable(url: str) -> None:
    """Raise SourceError at once where nothing answers: the libraries try for half a minute."""
    if getproxies().get(urlparse(url).scheme):
        return  # the proxy knows
    address = urlparse(url)
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection((address.hostname or "", port), _TIMEOUT_S).close()
    except OSError as error:
        raise SourceError(
            f"{address.hostname} cannot be reached ({error.strerror or error})",
            "check the connection, or give a file with model.weights=PATH",
        ) from error
