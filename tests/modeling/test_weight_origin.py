"""Where initial weights come from: known for each kind of source, kept through bundles, restrictions said aloud."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torchvision.models import get_model_weights

from image_classifier.modeling.backbones import torchvision_backbone
from image_classifier.modeling.weight_origin import (
    WeightOrigin,
    bundle_origin,
    file_origin,
    library_origin,
    licence_warning,
    restriction,
    weights_in_words,
)
from image_classifier.text import printable

KINDS = st.sampled_from(["scratch", "timm", "torchvision", "library", "file", "unknown"])
TEXTS = st.text(max_size=20).map(lambda text: " ".join(text.split()))
KEYS = st.sampled_from(["origin", "name", "licence", "bundles", "url"]) | st.text()
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.just("\ud800"),
    lambda inner: st.lists(inner) | st.dictionaries(KEYS, inner),
)


@given(st.builds(WeightOrigin, KINDS, TEXTS, TEXTS, TEXTS, TEXTS, TEXTS, st.lists(TEXTS).map(tuple)))
def test_an_origin_is_read_as_it_was_written(origin: WeightOrigin) -> None:
    assert WeightOrigin.from_dict(json.loads(json.dumps(origin.as_dict()))) == origin


@given(JSON)
def test_whatever_a_strangers_bundle_records_gives_sentences_of_text(recorded: Any) -> None:
    origin = bundle_origin("parent", recorded)
    assert origin.bundles[0] == "parent" and all(
        printable(sentence) == sentence for sentence in weights_in_words(origin)
    )
    assert WeightOrigin.from_dict(json.loads(json.dumps(origin.as_dict()))) == origin


def test_weights_of_timm_have_its_licence_and_page() -> None:
    import timm

    origin = library_origin("timm.create_model", timm.get_pretrained_cfg("convnextv2_atto.fcmae").to_dict())
    assert origin == WeightOrigin(
        "timm",
        "convnextv2_atto.fcmae",
        "cc-by-nc-4.0",
        "https://github.com/facebookresearch/ConvNeXt-V2",
        "timm/convnextv2_atto.fcmae",
    )
    assert origin.page == "https://huggingface.co/timm/convnextv2_atto.fcmae"


def test_weights_of_torchvision_have_a_page_and_a_licence_where_it_states_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(get_model_weights("resnet18")["DEFAULT"]), "get_state_dict", lambda *_, **__: {})
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", lambda *_, **__: None)
    target = "image_classifier.modeling.backbones.torchvision_backbone"
    config: Any = torchvision_backbone("resnet18", "DEFAULT").pretrained_cfg
    origin = library_origin(target, config)
    assert (origin.origin, origin.name, origin.licence) == ("torchvision", "resnet18.IMAGENET1K_V1", "")
    assert origin.page.startswith("https://github.com/pytorch/vision") and not licence_warning(origin)
    swag = get_model_weights("vit_b_16")["IMAGENET1K_SWAG_E2E_V1"]
    assert "forbids commercial use" in licence_warning(library_origin(target, {"license": swag.meta["license"]}))


def test_a_network_of_another_library_is_named_by_what_builds_it() -> None:
    origin = library_origin("my_networks.Net", {"license": "unknown"})
    assert origin == WeightOrigin("library", "my_networks.Net")
    assert weights_in_words(origin) == (
        "The training started from weights of my_networks.Net (licence not stated by the source).",
    )


@pytest.mark.parametrize(
    ("beside", "licence"),
    [
        ({}, ""),
        ({"config.json": {"license": "mit"}}, "mit"),
        ({"config.json": {"architecture": "resnet18", "pretrained_cfg": {"license": "cc-by-nc-4.0"}}}, "cc-by-nc-4.0"),
        ({"bundle.json": {"provenance": {"initial_weights": {"origin": "timm", "licence": "gemma"}}}}, "gemma"),
        ({"bundle.json": {"provenance": None}, "config.json": [1]}, ""),
    ],
)
def test_a_file_is_known_by_its_hash_and_by_the_licence_beside_it(
    tmp_path: Path, beside: dict[str, Any], licence: str
) -> None:
    path = tmp_path / "w.pth"
    path.write_bytes(b"weights")
    for name, content in beside.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert file_origin(path) == WeightOrigin("file", "w.pth", licence, sha256=hashlib.sha256(b"weights").hexdigest())


def test_the_header_of_safetensors_comes_before_what_lies_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    (tmp_path / "config.json").write_text('{"license": "mit"}')
    save_file({"a": torch.zeros(2)}, path)
    assert file_origin(path).licence == "mit"
    save_file({"a": torch.zeros(2)}, path, {"license": "apple-amlr"})
    assert file_origin(path).licence == "apple-amlr"


def test_a_chain_of_bundles_keeps_the_first_origin() -> None:
    first = WeightOrigin("timm", "x.y", "cc-by-nc-4.0", hub_id="timm/x.y")
    last = bundle_origin("second", bundle_origin("first", first.as_dict()).as_dict())
    assert last.bundles == ("second", "first") and last.licence == first.licence and last.page == first.page
    assert weights_in_words(last)[0] == (
        "The training started from weights of timm, x.y, by way of the model second, first (licence cc-by-nc-4.0)."
    )
    assert "does not say" in weights_in_words(bundle_origin("old", None))[0]
    (scratch,) = weights_in_words(bundle_origin("mine", WeightOrigin("scratch").as_dict()))
    assert scratch == "The training started from the model mine, which started from scratch."


@pytest.mark.parametrize(
    ("licence", "says"),
    [
        *(
            (open_, "")
            for open_ in ("apache-2.0", "Apache 2.0", "mit", "BSD-3-Clause", "cc-by-4.0", "cc0-1.0", "", "unknown")
        ),
        *(
            (closed, "forbids commercial use")
            for closed in (
                "cc-by-nc-4.0",
                "CC BY-NC-SA 4.0",
                "fair-noncommercial-research-license",
                "apple-amlr",
                "https://github.com/facebookresearch/SWAG/blob/main/LICENSE",
            )
        ),
        *((own, "has terms of its own") for own in ("dinov3-license", "other", "gemma", "apple-ascl", "cc-by-sa-4.0")),
    ],
)
def test_a_licence_is_open_or_what_it_restricts_is_said(licence: str, says: str) -> None:
    assert restriction(licence) == says
    origin = WeightOrigin("timm", "x.y", licence, hub_id="timm/x.y")
    warning = licence_warning(origin)
    assert len(weights_in_words(origin)) == (2 if says else 1) and bool(warning) == bool(says)
    assert says in warning and (not warning or warning.endswith("See https://huggingface.co/timm/x.y"))
