#!/usr/bin/env bash
# torch.fx 2.14.1 with timm 1.0.31: a traced network keeps the mode of its batch normalisation, whatever .train() and
# .eval() say afterwards; torchvision 0.29.2's networks follow the mode. Neither library warns.
#
# timm's BatchNormAct2d is no nn.BatchNorm2d for the tracer: its forward is traced through, and `training` becomes a
# constant of the graph. Traced in training mode, .eval() leaves the statistics of the batch in use: what an image gets
# as an answer depends on the images beside it. Traced in evaluation mode, .train() never updates the statistics.
#
# Seen: "timm traced in train mode: answers in eval mode depend on the batch: True" and, for torchvision, False.
# Fails when that changes. Needs 6 GB of disk for torch.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.2 timm==1.0.31
cd "$folder"
cat > seen.py <<'PYTHON'
import timm
import torch
import torchvision


def traced(make, training):
    torch.manual_seed(0)
    return torch.fx.symbolic_trace(make().train(training))


def depends_on_the_batch(network):
    network.eval()
    pixels = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return not torch.allclose(network(pixels)[:2], network(pixels[:2]), atol=1e-3)


def updates_statistics(network):
    network.train()
    before = {name: value.clone() for name, value in network.named_buffers() if name.endswith("running_mean")}
    with torch.no_grad():
        network(torch.rand(4, 3, 64, 64))
    return any(not torch.equal(value, before[name]) for name, value in network.named_buffers() if name in before)


makers = {
    "timm": lambda: timm.create_model("mobilenetv3_small_050"),
    "torchvision": lambda: torchvision.models.mobilenet_v3_small(),
}
seen = {}
for name, make in makers.items():
    seen[name] = depends_on_the_batch(traced(make, True)), updates_statistics(traced(make, False))
    print(f"{name} traced in train mode: answers in eval mode depend on the batch: {seen[name][0]}")
    print(f"{name} traced in eval mode: train mode updates the statistics: {seen[name][1]}")
assert seen == {"timm": (True, False), "torchvision": (False, True)}, seen
PYTHON
"$folder/venv/bin/python" seen.py
