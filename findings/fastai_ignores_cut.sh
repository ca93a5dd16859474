#!/usr/bin/env bash
# fastai 2.8.12: `vision_learner` has a parameter `cut`, the layer at which the pretrained network ends, and never passes
# it on. torchvision's MobileNetV2 pools by a function and not by a layer, so fastai cannot find the place by itself: the
# call that names it, cut=-1, ends with a bare StopIteration. `create_vision_model` with the same argument works.
#
# A network that pools by a layer helps: nn.Sequential(network.features, nn.AdaptiveAvgPool2d(1), ...).
#
# Seen: "vision_learner(cut=-1): StopIteration" and "create_vision_model(cut=-1): ok". Needs 6 GB of disk for torch.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet fastai==2.8.12 fastprogress==1.0.3 torch==2.14.1 torchvision==0.29.2
cat > "$folder/seen.py" <<'PYTHON'
import sys
from pathlib import Path

import numpy as np
from fastai.vision.all import ImageDataLoaders, create_vision_model, vision_learner
from PIL import Image
from torchvision.models import mobilenet_v2

root = Path(sys.argv[1])
for label in ("even", "odd"):
    (root / label).mkdir(parents=True)
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / label / f"{number}.png")
loaders = ImageDataLoaders.from_folder(root, valid_pct=0.5, bs=2, num_workers=0, seed=0)


def outcome(call):
    try:
        call()
        return "ok"
    except StopIteration:
        return "StopIteration"


learner = outcome(lambda: vision_learner(loaders, mobilenet_v2, pretrained=False, cut=-1))
model = outcome(lambda: create_vision_model(mobilenet_v2, 2, pretrained=False, cut=-1))
print(f"vision_learner(cut=-1): {learner}")
print(f"create_vision_model(cut=-1): {model}")
assert (learner, model) == ("StopIteration", "ok"), "fastai behaves otherwise now"
PYTHON
"$folder/venv/bin/python" "$folder/seen.py" "$folder/pictures" 2> >(grep -v -i warn >&2)
