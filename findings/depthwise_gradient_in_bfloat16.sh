#!/usr/bin/env bash
# torch 2.14.1 on a processor with AMX or AVX512-BF16: the gradient of a strided depthwise convolution is tens of times
# slower in bfloat16 than in float32, though its forward pass is as fast. So bf16 autocast, which makes a step of
# ResNet-18 twice as fast, makes one of MobileNetV3 slower than float32. A kernel of 5 or 7 is slow without a stride too.
#
# oneDNN has a fast kernel for the gradient in bfloat16 only for kernels of 3 with stride 1.
#
# Seen (576 channels, 14 px, kernel 3, 16 images, two cores of a Xeon with AMX): stride 2 73 ms against 1.3 ms; stride 1
# 2.6 ms against 2.3 ms. Fails where bfloat16 takes less than 8 times as long at stride 2, or more than 4 times at 1.
# Needs 6 GB of disk for torch, and a processor with avx512_bf16 or amx_bf16 in /proc/cpuinfo.
set -euo pipefail
grep -q -e avx512_bf16 -e amx_bf16 /proc/cpuinfo || { echo "this processor has no bfloat16: nothing to see"; exit 0; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1
cat > "$folder/seen.py" <<'PYTHON'
import time

import torch


def gradient_ms(dtype, stride):
    convolution = torch.nn.Conv2d(576, 576, 3, stride, 1, groups=576, bias=False).to(dtype)
    convolution = convolution.to(memory_format=torch.channels_last)
    pixels = torch.rand(16, 576, 14, 14).to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    fastest = float("inf")
    for _ in range(6):
        answer = convolution(pixels)
        start = time.perf_counter()
        torch.autograd.grad(answer, (pixels, convolution.weight), torch.ones_like(answer))
        fastest = min(fastest, 1000 * (time.perf_counter() - start))
    return fastest


ratios = {}
for stride in (1, 2):
    half, whole = gradient_ms(torch.bfloat16, stride), gradient_ms(torch.float32, stride)
    ratios[stride] = half / whole
    print(f"torch {torch.__version__}, stride {stride}: bfloat16 {half:.1f} ms, float32 {whole:.1f} ms")
assert ratios[2] > 8 and ratios[1] < 4, ratios
PYTHON
"$folder/venv/bin/python" "$folder/seen.py"
