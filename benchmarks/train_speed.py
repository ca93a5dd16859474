"""Training speed against a plain PyTorch loop, run in turn: same network, size, batch and epochs.

python benchmarks/train_speed.py PLAIN_LOOP.py ARCHIVE [options] [overrides of `train`]

See runs.py for what PLAIN_LOOP.py prints; ARCHIVE holds train/ and test/ folders, or one folder a class.
Options: --arch resnet18 --px 64 --batch 64 --epochs 1 --rounds 3. Our seed is the round's number.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

from runs import Run, arguments, plain_loop, train, unpack


def main() -> None:
    options, overrides = arguments(__doc__, px=64, batch=64, epochs=1, rounds=3).parse_known_args()
    ours = [
        f"model={options.arch}",
        f"data.image_size={options.px}",
        f"data.batch_size={options.batch}",
        f"trainer.max_epochs={options.epochs}",
    ]
    with tempfile.TemporaryDirectory() as folder:
        data = unpack(options.archive, Path(folder))
        pairs: list[tuple[Run, Run]] = []
        for seed in range(options.rounds):
            pairs.append(
                (
                    plain_loop(options, data),
                    train(data, Path(folder), [*ours, f"seed={seed}", "logger=none", *overrides]),
                )
            )
            print(f"round {seed + 1}: plain loop {pairs[-1][0]}, train {pairs[-1][1]}", flush=True)
    for side, name in enumerate(("plain loop", "train")):
        speeds, scores = ([getattr(pair[side], key) for pair in pairs] for key in ("images_s", "accuracy"))
        print(
            f"{name:<11} images/s {statistics.median(speeds):7.1f} (each {speeds})   test accuracy "
            f"{statistics.mean(scores):.4f} (each {scores})"
        )
    ratios = [ours.images_s / plain.images_s for plain, ours in pairs]
    print(
        f"images/s, train / plain loop: median {statistics.median(ratios):.2f}, pair by pair "
        f"{[round(ratio, 2) for ratio in ratios]}"
    )


if __name__ == "__main__":
    main()
