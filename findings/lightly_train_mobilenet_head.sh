#!/usr/bin/env bash
# LightlyTrain 0.18.0 with timm 1.0.31: `train_image_classification` lists timm/mobilenetv2_100 among its models, and its
# first step ends with "mat1 and mat2 shapes cannot be multiplied". The class head is as wide as what timm's network
# answers (1280), and is fed the features before timm's convolutional head (320). ResNet-18, which has no such head, trains.
#
# Seen: "timm/mobilenetv2_100: mat1 and mat2 shapes cannot be multiplied (2x320 and 1280x2)" and "timm/resnet18: trained".
# LightlyTrain is AGPL: measured only. Needs 8 GB of disk.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet lightly-train==0.18.0 timm==1.0.31 torch==2.14.1 torchvision==0.29.2
cat > "$folder/seen.py" <<'PYTHON'
import sys
from pathlib import Path

import lightly_train
import numpy as np
import timm
import torch
from PIL import Image

root = Path(sys.argv[1])


def outcome(name):
    weights = root / f"{name}.pth"
    torch.save(timm.create_model(name).state_dict(), weights)
    try:
        lightly_train.train_image_classification(
            out=root / name,
            data={"train": str(root / "pictures"), "val": str(root / "pictures"), "classes": {0: "even", 1: "odd"}},
            model=f"timm/{name}",
            model_args={"backbone_weights": str(weights)},
            steps=1,
            batch_size=2,
            num_workers=0,
            accelerator="cpu",
            devices=1,
        )
        return "trained"
    except RuntimeError as error:
        return str(error)


if __name__ == "__main__":
    for label in ("even", "odd"):
        (root / "pictures" / label).mkdir(parents=True)
        for number in range(4):
            pixels = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "pictures" / label / f"{number}.png")
    found = {name: outcome(name) for name in ("mobilenetv2_100", "resnet18")}
    for name, text in found.items():
        print(f"SEEN timm/{name}: {text}")
    assert "(2x320 and 1280x2)" in found["mobilenetv2_100"], "LightlyTrain behaves otherwise now"
    assert found["resnet18"] == "trained", "LightlyTrain behaves otherwise now"
PYTHON
"$folder/venv/bin/python" "$folder/seen.py" "$folder" > "$folder/output" 2>&1 || { tail -5 "$folder/output"; exit 1; }
grep "^SEEN" "$folder/output" | cut -c6-
