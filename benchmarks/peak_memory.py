"""Peak memory of `train` beyond that of a bare loop with the same network and batch.

python benchmarks/peak_memory.py FOLDER [FOLDER ...] [--arch resnet18 --px 64 --batch 64 --steps 50] [-- overrides of
`train`]

Both sides are commands of their own. Counted every 50 ms is the memory of a command with all its child processes:
shared pages once (proportional set size), and apart from it what is not backed by a file, which the system cannot
drop when memory runs short.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from runs import ROOT

_BARE = """
import sys, torch, torchvision
arch, px, batch, steps = sys.argv[1], *map(int, sys.argv[2:])
network = torchvision.models.get_model(arch, num_classes=10).to(memory_format=torch.channels_last)
optimizer = torch.optim.AdamW(network.parameters())
pixels, targets = torch.randint(0, 256, (batch, 3, px, px), dtype=torch.uint8), torch.randint(0, 10, (batch,))
for _ in range(steps):
    with torch.autocast("cpu", torch.bfloat16, enabled=torch.backends.mkldnn.is_available()):
        inputs = (pixels.float() / 255).contiguous(memory_format=torch.channels_last)
        loss = torch.nn.functional.cross_entropy(network(inputs), targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
"""
_INTERVAL_S = 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--arch", default="resnet18")
    for name, value in (("px", 64), ("batch", 64), ("steps", 50)):
        parser.add_argument(f"--{name}", type=int, default=value)
    words = sys.argv[1:]
    mark = words.index("--") if "--" in words else len(words)
    options, overrides = parser.parse_args(words[:mark]), words[mark + 1 :]
    roots = ",".join(str(folder.resolve()) for folder in options.folders)
    ours = [
        f"data.dir=[{roots}]",
        f"model={options.arch}",
        f"data.image_size={options.px}",
        f"data.batch_size={options.batch}",
    ]
    with tempfile.TemporaryDirectory() as folder:
        bare = _peak(["-c", _BARE, options.arch, options.px, options.batch, 5], Path(folder))
        whole = _peak(
            [ROOT / "commands.py", "train", "data=folder", *ours, f"trainer.max_steps={options.steps}", *overrides],
            Path(folder),
        )
    for name, of_bare, of_train in zip(("all memory", "not backed by a file"), bare, whole, strict=True):
        print(
            f"{name:<21} bare loop {of_bare / 1e9:.2f} GB, train {of_train / 1e9:.2f} GB: "
            f"{(of_train - of_bare) / 1e9:+.2f} GB"
        )


def _peak(script: list[object], folder: Path) -> tuple[int, int]:
    """Largest proportional and largest anonymous memory in bytes of a Python script with its children; ends this
    program where it fails.
    """
    process = subprocess.Popen([sys.executable, *map(str, script)], cwd=folder, stdout=subprocess.DEVNULL)
    largest = (0, 0)
    while process.poll() is None:
        now = [_memory(pid) for pid in _tree(process.pid)]
        largest = (max(largest[0], sum(item[0] for item in now)), max(largest[1], sum(item[1] for item in now)))
        time.sleep(_INTERVAL_S)
    if process.returncode:
        sys.exit(f"{script} ended with {process.returncode}")
    return largest


def _tree(pid: int) -> list[int]:
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        children = [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except OSError:  # it ended meanwhile
        return []
    return [pid, *(grandchild for child in children for grandchild in _tree(child))]


def _memory(pid: int) -> tuple[int, int]:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return 0, 0
    values = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    return values["Pss"], values["Pss_Anon"]


if __name__ == "__main__":
    main()
