"""Progressive sizes: equal shares of the run's steps, decided by the step alone; networks and settings that cannot
are refused in one line.
"""

from typing import Any

import pytest
import torch

from image_classifier.dataset.settings import DataSettings
from image_classifier.errors import ConfigError
from image_classifier.modeling.classifier import check_sizes
from image_classifier.modeling.convnet import ConvNet
from image_classifier.training.augment import BatchAugment
from image_classifier.training.augment.geometry import downsized
from tests.conftest import QUICK, Command, MakeTree
from tests.training.test_augment_copies import STILL, module_over, watched


@pytest.mark.parametrize("limits", [{"max_steps": 6, "max_epochs": -1}, {"max_epochs": 3}])
def test_each_size_has_an_equal_share_of_the_steps(limits: dict[str, int]) -> None:
    seen = watched(module_over(BatchAugment(**STILL, flip=False), progressive_sizes=[4, 6, 8]), **limits).seen
    assert [pixels.shape[2] for _, pixels in seen] == [4, 4, 6, 6, 8, 8]
    assert {pixels.dtype for _, pixels in seen} == {torch.uint8}


def test_the_last_size_is_untouched_and_a_smaller_one_is_antialiased() -> None:
    board = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    board[:, :, ::2, ::2] = board[:, :, 1::2, 1::2] = 200
    assert downsized(board, 8) is board
    assert downsized(board, 4).float().sub(100).abs().max() < 30  # every second pixel alone would be black or white


@pytest.mark.parametrize("sizes", [[24], [24, 16, 32], [], [0, 32]])
def test_sizes_that_do_not_grow_to_the_image_size_are_refused(sizes: list[int]) -> None:
    with pytest.raises(ConfigError, match="data.progressive_sizes"):
        DataSettings(image_size=32, progressive_sizes=sizes)


@pytest.mark.parametrize("node", [{"global_pool": False}, {"global_pool": False, "hidden": [16]}])
def test_a_network_that_flattens_is_refused(node: dict[str, Any]) -> None:
    check_sizes(ConvNet(16, [4, 8]), [8, 16])
    with pytest.raises(ConfigError, match="data.progressive_sizes"):
        check_sizes(ConvNet(16, [4, 8], **node), [8, 16])


@pytest.mark.slow
def test_a_run_goes_through_its_sizes_and_answers_at_the_last(
    command: Command, make_tree: MakeTree, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_tree(cat=10, dog=10)
    monkeypatch.chdir(root.parent)
    small = ("data=folder", f"data.dir={root}", "data.image_size=16", "data.batch_size=4", *QUICK, "name=run")
    answer = command(
        "train", *small, "data.progressive_sizes=[8,16]", "model.backbone.channels=[4,8]", "trainer.max_epochs=2"
    )
    assert answer.code == 0, answer.err
    refused = command(
        "train", *small, "data.progressive_sizes=[8,16]", "model=mlp", "model.backbone.hidden=[8]", "overwrite=true"
    )
    assert refused.code == 2 and refused.err.splitlines()[-1].startswith("error: data.progressive_sizes"), refused.err
