"""A recipe changes pictures, never their shape, type or the run's repeatability; the moves of an image are one
resampling.
"""

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from image_classifier.cli.hydra_app import instantiate
from image_classifier.errors import ConfigError
from image_classifier.training.augment import BatchAugment, Mix, RandomOperations, geometry
from image_classifier.training.augment.erasing import erase
from image_classifier.training.augment.rand_augment import OPERATIONS, Draw

CONF = Path(__file__).resolve().parents[2] / "conf"
RECIPES = sorted(path.stem for path in (CONF / "augment").glob("*.yaml") if path.stem != "none")
STILL: dict[str, Any] = {"crop_scale": (1, 1), "aspect": (1, 1), "flip": False}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(count: int, size: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator(seed))


def changed(augment: BatchAugment, pixels: torch.Tensor, seed: int = 0) -> torch.Tensor:
    return augment(pixels, torch.zeros(len(pixels), dtype=torch.int64), 3, generator(seed))[0]


@cache
def recipe(name: str, *overrides: str) -> BatchAugment:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", [f"augment={name}", *overrides])
    augment = instantiate(config.augment)
    assert isinstance(augment, BatchAugment) and augment.name == name
    return augment


def test_the_issue_names_these_recipes() -> None:
    assert {"light", "simpsons", "trivial", "randaugment", "mix", "strong", "default", "small"} == set(RECIPES)
    for path in (CONF / "augment").glob("*.yaml"):
        assert path.read_text().startswith("# "), f"{path.name} does not say what it is for"


@pytest.mark.parametrize("name", RECIPES)
@settings(deadline=None, max_examples=8)
@given(count=st.integers(1, 9), size=st.sampled_from([2, 8, 17]), last=st.booleans(), seed=st.integers(0, 99))
def test_shape_type_layout_and_repeatability(name: str, count: int, size: int, last: bool, seed: int) -> None:
    augment = recipe(name)
    layout = torch.channels_last if last else torch.contiguous_format
    pixels, targets = noise(count, size, seed).contiguous(memory_format=layout), torch.arange(count) % 3
    before = pixels.clone()
    (once, shares), (again, _) = (augment(pixels, targets, 3, generator(seed)) for _ in range(2))
    assert once.shape == pixels.shape and once.dtype == torch.uint8 and once.is_contiguous(memory_format=layout)
    assert torch.equal(once, again) and torch.equal(pixels, before)
    if augment.mix:
        assert shares.dtype == torch.float32 and torch.allclose(shares.sum(dim=1), torch.ones(count))
    else:
        assert torch.equal(shares, targets) and shares.dtype == torch.int64


@pytest.mark.parametrize("size", [1, 7, 16, 33])
def test_doing_nothing_changes_nothing(size: int) -> None:
    pixels = noise(4, size)
    assert torch.equal(changed(BatchAugment(**STILL), pixels), pixels)
    operations = RandomOperations(count=3, strength=(0, 0), shear=1, translate=1, rotation=90, tone=1)
    names = [name for name in OPERATIONS if name not in ("autocontrast", "equalize")]  # which have no strength
    for name in names:
        draw = Draw(torch.full((1, 4), OPERATIONS.index(name)), torch.zeros(1, 4))
        assert torch.equal(operations.maps(draw), torch.eye(3).expand(4, 3, 3))
        assert torch.equal(operations.recolour(pixels, draw), pixels)


def test_a_flip_is_exact_and_happens_to_about_half() -> None:
    pixels = noise(400, 6)
    flipped = changed(BatchAugment(crop_scale=(1, 1), aspect=(1, 1), flip=True), pixels)
    same = (flipped == pixels).flatten(1).all(1)
    mirrored = (flipped == pixels.flip(3)).flatten(1).all(1)
    assert (same | mirrored).all()
    assert 150 < mirrored.sum() < 250


def test_each_image_of_a_batch_is_changed_in_its_own_way() -> None:
    pixels = noise(1, 16).expand(8, -1, -1, -1)
    assert len({tuple(image.flatten().tolist()) for image in changed(BatchAugment(), pixels)}) == 8


@pytest.mark.parametrize("name", RECIPES)
def test_all_geometry_of_a_batch_is_one_resampling(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    sample = functional.grid_sample

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(len(args[0]))
        return sample(*args, **kwargs)

    monkeypatch.setattr(functional, "grid_sample", counted)
    changed(recipe(name), noise(16, 16))
    assert calls == ([] if name == "small" else [16])  # which only copies


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in RECIPES if name != "small"])
def test_where_a_mirrored_image_is_another_class_nothing_is_mirrored(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    maps: list[torch.Tensor] = []
    resample = geometry.resample
    monkeypatch.setattr(
        geometry, "resample", lambda pixels, map_, border: (maps.append(map_), resample(pixels, map_, border))[1]
    )
    augment = recipe(name, "data.flip=false")
    changed(augment, noise(500, 8))
    assert augment.border == "background"  # a reflection would show mirrored parts
    assert (torch.linalg.det(maps[0]) > 0).all()
    changed(recipe(name, "data.flip=true"), noise(500, 8))
    assert 150 < (torch.linalg.det(maps[1]) < 0).sum() < 350


def test_the_picture_never_folds_in_any_perspective() -> None:
    maps = geometry.perspective(torch.rand(2000, 4, 2, generator=generator()))
    corners = torch.tensor([[-1.0, -1.0, 1.0], [1.0, -1.0, 1.0], [1.0, 1.0, 1.0], [-1.0, 1.0, 1.0]])
    back = torch.linalg.inv(maps) @ corners.T  # where the source's corners come to lie
    assert (back[:, 2] / torch.linalg.inv(maps)[:, 2, 2:] > 0).all()
    assert (torch.linalg.det(maps) > 0).all()


def test_a_perspective_takes_the_corners_inward_as_asked() -> None:
    inward = torch.rand(5, 4, 2, generator=generator()) * 0.6
    corners = torch.tensor([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])
    seen = torch.cat([corners * (1 - inward), torch.ones(5, 4, 1)], dim=2) @ geometry.perspective(inward).transpose(
        1, 2
    )
    assert torch.allclose(seen[..., :2] / seen[..., 2:], corners.expand(5, 4, 2), atol=1e-4)


def test_quarter_turns_and_whole_shifts_are_exact() -> None:
    pixels = noise(2, 8)
    turned = geometry.resample(pixels, geometry.turn(torch.full((2,), torch.pi / 2)), "reflect")
    assert torch.equal(turned, pixels.rot90(1, (2, 3))) or torch.equal(turned, pixels.rot90(-1, (2, 3)))
    shifted = geometry.resample(pixels, geometry.translate(torch.full((2,), 2 / 8), torch.zeros(2)), "background")
    assert torch.equal(shifted[:, :, :, :6], pixels[:, :, :, 2:])


def test_moves_one_after_the_other_are_their_product() -> None:
    pixels = functional.interpolate(noise(1, 6).float(), size=48, mode="bicubic").clamp(0, 255).round().to(torch.uint8)
    first, second = geometry.shear(torch.tensor([0.2]), torch.tensor([0.0])), geometry.turn(torch.tensor([0.3]))
    at_once = geometry.resample(pixels, first @ second, "reflect").float()
    one_by_one = geometry.resample(geometry.resample(pixels, first, "reflect"), second, "reflect").float()
    middle = (slice(None), slice(None), slice(12, 36), slice(12, 36))
    assert (at_once - one_by_one)[middle].abs().mean() < 2
    assert (at_once - pixels)[middle].abs().mean() > 5


def test_beyond_the_edge_is_the_colour_of_the_rim() -> None:
    pixels = torch.full((1, 3, 9, 9), 200, dtype=torch.uint8)
    pixels[:, :, 3:6, 3:6] = 7
    pixels[0, :, 0, 0] = 90  # one odd corner moves no median
    shifted = geometry.resample(pixels, geometry.translate(torch.tensor([0.5]), torch.tensor([0.5])), "background")
    assert (shifted[:, :, 6:, 6:] == 200).all()


def test_operations_are_drawn_equally_often_and_within_the_range() -> None:
    draw = RandomOperations(count=2, strength=(0.2, 0.6)).draw(7000, generator())
    counts = torch.bincount(draw.kinds.flatten(), minlength=len(OPERATIONS))
    assert draw.kinds.shape == (2, 7000) and counts.min() > 850 and counts.max() < 1150
    assert draw.amounts.abs().min() >= 0.2 and draw.amounts.abs().max() <= 0.6
    assert 0.45 < (draw.amounts > 0).float().mean() < 0.55


def test_erasing_hits_its_share_of_the_images_with_one_small_rectangle() -> None:
    pixels = torch.full((600, 3, 20, 20), 13, dtype=torch.uint8)
    erased = erase(pixels, 0.5, generator())
    hit = (erased != 13).any(dim=1).flatten(1).float().mean(dim=1)
    assert 230 < (hit > 0).sum() < 350 and hit.max() < 0.25
    assert torch.equal(erase(pixels, 0.0, generator()), pixels)


@pytest.mark.parametrize("scale", [(0.0, 1.0), (0.5, 1.5), (0.9, 0.5), (0.5,)])
def test_an_impossible_range_is_refused(scale: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="crop_scale"):
        BatchAugment(crop_scale=scale)


@pytest.mark.parametrize(
    ("build", "key"),
    [
        (lambda: BatchAugment(perspective=1.5), "augment.perspective"),
        (lambda: BatchAugment(erase=-0.1), "augment.erase"),
        (lambda: BatchAugment(border="wrap"), "augment.border"),
        (lambda: RandomOperations(count=0), "operations.count"),
        (lambda: RandomOperations(strength=(0.5, 0.2)), "operations.strength"),
        (lambda: RandomOperations(posterize=0), "operations.posterize"),
        (lambda: Mix(None, None), "augment.mix"),
        (lambda: Mix(mixup=0.0), "augment.mix"),
        (lambda: Mix(probability=2), "mix.probability"),
    ],
)
def test_an_impossible_value_is_refused_by_its_key(build: Callable[[], object], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        build()


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"rotation": "abc"}, "augment.rotation"),
        ({"rotation": math.nan}, "augment.rotation"),
        ({"rotation": -5}, "augment.rotation"),
        ({"rotation": 1e9}, "augment.rotation"),
        ({"flip": "abc"}, "augment.flip"),
        ({"erase": True}, "augment.erase"),
        ({"crop_scale": "wide"}, "augment.crop_scale"),
        ({"crop_scale": [0.5, "x"]}, "augment.crop_scale"),
    ],
)
def test_values_that_cannot_be_name_their_key(values: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        BatchAugment(**values)  # type: ignore[arg-type]
