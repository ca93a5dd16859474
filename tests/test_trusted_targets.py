"""`_target_` nodes: only trusted names are built, and a refusal is one line."""

from __future__ import annotations

from typing import Any

import pytest
from omegaconf import OmegaConf

from image_classifier.errors import ConfigError
from image_classifier.instantiate import instantiate

TRUSTED_ERRORS = [
    ({"_target_": "os.system", "command": "true"}, "a._target_ names os.system"),
    ({"x": [{"_target_": "subprocess.run"}]}, "a.x[0]._target_ names subprocess.run"),
    ({"_target_": "torch.load"}, "trusted_packages=[torch]"),
    ({"_target_": "mine.Model"}, "trusted_packages=[mine]"),
    ({"_target_": "timm.create_model_evil"}, "not on the list"),
    ({"_target_": "image_classifier.dataset.sources.os.remove", "path": "x"}, "is not allowed"),
    ({"_target_": "image_classifier.dataset.sources.Nothing"}, "no Nothing in image_classifier.dataset.sources"),
    ({"_target_": "image_classifier.dataset.sources.Foldr"}, "did you mean Folder?"),
    (
        {"_target_": "image_classifier.dataset.sources.Folder", "dir": "x", "zip_path": "y"},
        "a.zip_path: image_classifier.dataset.sources.Folder takes no argument",
    ),
]


@pytest.mark.parametrize(("node", "words"), TRUSTED_ERRORS)
def test_instantiate_refuses(node: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        instantiate(OmegaConf.create({"a": node}).a)
    assert words in str(refused.value)


def test_instantiate_builds_trusted_targets() -> None:
    tree = OmegaConf.create(
        {
            "a": {"_target_": "image_classifier.dataset.sources.Folder", "dir": "${b}"},
            "b": "x",
            "none": {"_target_": None},
        }
    )
    assert instantiate(tree.a, archive="y").archive == "y"
    assert instantiate(None) is None
    assert instantiate(tree.none) is None
    assert str(instantiate({"_target_": "fractions.Fraction", "numerator": 3}, trusted=["fractions"])) == "3"


@pytest.mark.parametrize(
    ("node", "words"),
    [
        (
            {"_target_": "torch.nn.Dropout", "p": 3},
            "a: torch.nn.Dropout refuses its arguments: dropout probability has to be between 0 and 1",
        ),
        (
            {"_target_": "torch.optim.AdamW", "_partial_": True, "weight_dcay": 1},
            "takes no argument 'weight_dcay': did you mean weight_decay?",
        ),
        ({"_target_": "torch.nn.init.torch.load", "f": "x"}, "which belongs to torch.serialization and is not allowed"),
        ({"_target_": "torch.nn.Lineer"}, "did you mean Linear?"),
        ({"_target_": "nopackage.Thing"}, "pip install nopackage"),
    ],
)
def test_errors_of_others_are_one_line(node: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        instantiate(OmegaConf.create({"a": node}).a, trusted=["nopackage"])
    assert words in str(refused.value)


def test_a_bug_in_a_trusted_target_stays_a_bug() -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        instantiate({"_target_": f"{__name__}.broken"}, trusted=[__name__])


def broken() -> int:
    return int("x")
