"""Time to accuracy, whole command from start-up to bundle, against a plain PyTorch loop run just before it.

python benchmarks/time_to_accuracy.py PLAIN_LOOP.py ARCHIVE [options] [-- overrides of `train`] [-- overrides of
another run] ...

See runs.py for what PLAIN_LOOP.py prints; ARCHIVE holds train/ and test/ folders, or one folder a class.
Options: --arch resnet18 --px 64 --batch 64 --epochs 10; --plain ACCURACY,SECONDS takes the plain side from an earlier
run on this machine.
"""

from __future__ import annotations

import sys
import tempfile
from itertools import groupby
from pathlib import Path

from runs import arguments, plain_loop, train, unpack


def main() -> None:
    ours = [list(words) for is_mark, words in groupby(sys.argv[1:], lambda word: word == "--") if not is_mark]
    parser = arguments(__doc__, px=64, batch=64, epochs=10)
    parser.add_argument("--plain", default="")
    options = parser.parse_args(ours.pop(0))
    with tempfile.TemporaryDirectory() as folder:
        data = unpack(options.archive, Path(folder))
        if options.plain:
            accuracy, seconds = map(float, options.plain.split(","))
        else:
            plain = plain_loop(options, data)
            accuracy, seconds = plain.accuracy, plain.seconds
        print(f"plain loop: test accuracy {accuracy:.4f} in {seconds:.0f} s", flush=True)
        for number, overrides in enumerate(ours or [["experiment=fast"]]):
            fresh = Path(folder) / f"run{number}"  # nothing is cached from an earlier run
            fresh.mkdir()
            run = train(data, fresh, overrides)
            print(
                f"train {' '.join(overrides)}: test accuracy {run.accuracy:.4f} in {run.seconds:.1f} s, "
                f"1/{seconds / run.seconds:.1f} of the time",
                flush=True,
            )


if __name__ == "__main__":
    main()
