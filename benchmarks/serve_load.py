"""How near `serve` comes to ONNX Runtime alone, how long its answers take at 70 % of what it can, and whether its
memory stays.

python benchmarks/serve_load.py BUNDLE IMAGES_DIR [--clients 32] [--seconds 20] [--rounds 3] [--memory 0] [--serve
KEY=VALUE ...]

Each round runs all sides in turn: `--clients` clients that each send their next image when they have an answer; ONNX
Runtime alone, in this process, over the same images decoded beforehand, in the server's own batch sizes; and decoding
alone, by as many threads. Where both use all cores, `cores` is what these allow for decoding and running. Then
requests come, 70 % as many a second as the clients got answered: evenly as load generators send them, and at random
moments as people do, where even a server that needs no time for itself has queues. `--memory 100000` sends so many
requests and fits a line through the memory of the server and of its model's process. All clients are one thread of
this process, whose processor time is shown.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnxruntime

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from image_classifier.errors import ClassifierError  # noqa: E402
from image_classifier.images import IMAGE_SUFFIXES, Preprocess  # noqa: E402
from image_classifier.inference.load import load_predictor  # noqa: E402
from image_classifier.inference.predictor import Predictor  # noqa: E402

_WARM_S = 3.0
_LOAD = 0.7
_STEPS = 50  # points of the line through the memory


class Clients:
    """Connections that are kept open, each with one request at a time."""

    def __init__(self, port: int, bodies: list[bytes]) -> None:
        self._port, self._requests = port, [self._request(body) for body in bodies]
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self.statuses: Counter[int] = Counter()
        self.next = 0

    @staticmethod
    def _request(image: bytes) -> bytes:
        body = (
            b'--f\r\nContent-Disposition: form-data; name="images"; filename="a.jpg"\r\n\r\n' + image + b"\r\n--f--\r\n"
        )
        kind = b"Content-Type: multipart/form-data; boundary=f\r\n"
        return b"POST /predict HTTP/1.1\r\nHost: localhost\r\n%bContent-Length: %d\r\n\r\n%b" % (kind, len(body), body)

    async def ask(self) -> float:
        """Seconds until the answer for the next image was there."""
        start = time.perf_counter()
        request = self._requests[self.next % len(self._requests)]
        self.next += 1
        reader, writer = self._idle.pop() if self._idle else await asyncio.open_connection("127.0.0.1", self._port)
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head.lower())
        if length is None:
            sys.exit(f"an answer without a length: {head!r}")
        await reader.readexactly(int(length[1]))
        self.statuses[int(head[9:12])] += 1
        if set(self.statuses) != {200}:
            sys.exit(f"an answer that is none: {head!r}")
        self._idle.append((reader, writer))
        return time.perf_counter() - start

    async def closed(self, clients: int, seconds: float) -> float:
        """Answers a second of so many clients."""
        self.close()
        first, end = self.statuses.total(), time.perf_counter() + seconds

        async def one() -> None:
            while time.perf_counter() < end:
                await self.ask()

        start = time.perf_counter()
        await asyncio.gather(*(one() for _ in range(clients)))
        return (self.statuses.total() - first) / (time.perf_counter() - start)

    async def open(self, rate: float, seconds: float, evenly: bool) -> list[float]:
        """The latencies of `rate` requests a second, evenly or at random moments, whether or not those before have
        their answer.
        """
        self.close()
        chance, tasks = random.Random(0), []
        due = time.perf_counter()
        end = due + seconds
        while due < end:
            due += 1 / rate if evenly else chance.expovariate(rate)
            if (wait := due - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            tasks.append(asyncio.create_task(self.ask()))
        return list(await asyncio.gather(*tasks))

    def close(self) -> None:
        """End all connections; those that were idle for long are closed by the server."""
        for _, writer in self._idle:
            writer.close()
        self._idle.clear()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", type=int, default=0)
    parser.add_argument("--most", type=int, default=256, help="different images")
    parser.add_argument("--serve", nargs="*", default=[], help="keys of conf/serve.yaml")
    options = parser.parse_args()
    found = sorted(path for path in options.images.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)[: options.most]
    if not found:
        sys.exit(f"{options.images} holds no images")
    if min(options.clients, options.seconds, options.rounds) <= 0:
        sys.exit("--clients, --seconds and --rounds must be above 0")
    try:
        predictor = load_predictor(options.bundle)
    except ClassifierError as error:
        sys.exit(str(error))
    print(
        f"{len(found)} images, {statistics.median(path.stat().st_size for path in found) / 1e3:.0f} kB "
        f"each; {options.bundle.name}",
        flush=True,
    )
    with _server(options.bundle, options.serve) as (pid, port):
        clients = Clients(port, [path.read_bytes() for path in found])
        asyncio.run(_measured(clients, options, pid, port, predictor, found))


async def _measured(
    clients: Clients, options: argparse.Namespace, pid: int, port: int, predictor: Predictor, paths: list[Path]
) -> None:
    pixels = _pixels(predictor.preprocess, paths)
    if options.rounds:
        await clients.closed(options.clients, _WARM_S)
    rates, shares, fair = [], [], []
    columns = ("serve/s", "alone/s", "decode/s", "serve/alone", "serve/cores", "batch", "clients", "server", "model")
    print(" " * 8 + "".join(f"{name:>13}" for name in columns))
    for number in range(1, options.rounds + 1):
        before, busy, start = await _batches(port), _busy(pid), time.perf_counter()
        own = time.process_time()
        rate = await clients.closed(options.clients, options.seconds)
        seconds, own, after = time.perf_counter() - start, time.process_time() - own, await _batches(port)
        server, model = ((now - then) / seconds for now, then in zip(_busy(pid), busy, strict=True))
        sizes = _sizes(before, after)
        alone = _alone(options.bundle / "model.onnx", pixels, sizes, options.seconds / 2)
        decode = _decode(predictor, paths, options.seconds / 4)
        rates.append(rate)
        shares.append(rate / alone)
        fair.append(rate * (1 / alone + 1 / decode))
        mean = sum(size * count for size, count in sizes.items()) / sum(sizes.values())
        figures = [
            f"{rate:.1f}",
            f"{alone:.1f}",
            f"{decode:.1f}",
            f"{shares[-1]:.2f}",
            f"{fair[-1]:.2f}",
            f"{mean:.1f}",
        ]
        print(
            f"round {number:<2}"
            + "".join(
                f"{figure:>13}" for figure in [*figures, f"{own / seconds:.0%}", f"{server:.0%}", f"{model:.0%}"]
            ),
            flush=True,
        )
    print(
        f"serve / ONNX Runtime alone: {statistics.median(shares):.2f}; serve / what the cores allow: "
        f"{statistics.median(fair):.2f}"
    )
    rate = _LOAD * statistics.median(rates)
    for name, evenly in (("evenly", True), ("at random", False)):
        latencies = np.array(await clients.open(rate, options.seconds, evenly))
        p50, p99 = (1000 * float(np.quantile(latencies, share)) for share in (0.5, 0.99))
        print(
            f"{rate:.0f} requests a second, {name}: p50 {p50:.1f} ms, p99 {p99:.1f} ms, {p99 / p50:.1f} "
            f"times as long; {len(latencies)} requests",
            flush=True,
        )
    if options.memory:
        await _memory(clients, options, pid)
    clients.close()
    print(f"statuses: {dict(clients.statuses)}")


async def _memory(clients: Clients, options: argparse.Namespace, pid: int) -> None:
    """The slope of both processes' memory over so many requests, the first tenth left out."""
    points: list[tuple[int, float, float]] = []
    first = clients.statuses.total()

    async def one() -> None:
        while clients.statuses.total() - first < options.memory:
            await clients.ask()
            done = clients.statuses.total() - first
            if done >= options.memory * (len(points) + 1) / _STEPS:
                points.append((done, *_resident(pid)))

    await asyncio.gather(*(one() for _ in range(options.clients)))
    late = np.array(points[len(points) // 10 :])
    for name, column in (("server", 1), ("model", 2)):
        slope = 10_000 * float(np.polyfit(late[:, 0], late[:, column], 1)[0])
        print(
            f"memory of the {name}: {late[0, column]:.1f} MiB, at the end {late[-1, column]:.1f}; "
            f"{1024 * slope:+.0f} KiB in 10 000 requests"
        )


def _alone(model: Path, pixels: np.ndarray, sizes: Counter[int], seconds: float) -> float:
    """Images a second of ONNX Runtime in batches as the server had them."""
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    chosen = random.Random(0).choices(list(sizes), list(sizes.values()), k=10_000)
    done, start = 0, 0.0
    for number, size in enumerate(chosen):
        if number == 3:  # the first ones are for warmth
            done, start = 0, time.perf_counter()
        first = (number * 7) % max(1, len(pixels) - size)
        session.run(names, {"pixels": pixels[first : first + size]})
        done += size
        if number > 3 and time.perf_counter() - start > seconds:
            break
    return done / (time.perf_counter() - start)


def _decode(predictor: Predictor, paths: list[Path], seconds: float) -> float:
    """Images a second that as many threads as there are cores decode."""
    contents = [path.read_bytes() for path in paths]
    with ThreadPoolExecutor(predictor.workers) as pool:
        done, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            done += sum(1 for _ in pool.map(predictor.preprocess.read, contents))
        return done / (time.perf_counter() - start)


def _pixels(preprocess: Preprocess, paths: list[Path]) -> np.ndarray:
    table = np.stack([preprocess.read(path).transpose(2, 0, 1) for path in paths])
    return np.concatenate([table] * (128 // len(table) + 1))


async def _batches(port: int) -> dict[int, float]:
    """How many images were answered in batches of at most so many, from /metrics."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    said = (await reader.read(-1)).decode()
    writer.close()
    found = {
        int(float(most)): float(count)
        for most, count in re.findall(r'batch_images_bucket\{le="([\d.]+)",model="[^"]+"\} ([\d.]+)', said)
    }
    return found or dict.fromkeys((1, 2, 4, 8, 16, 32, 64, 128), 0.0)


def _sizes(before: dict[int, float], after: dict[int, float]) -> Counter[int]:
    """How many batches there were of about each size: a bucket's images divided by its upper bound's and the one's
    before it.
    """
    counts = [(most, after[most] - before.get(most, 0.0)) for most in sorted(after)]
    sizes: Counter[int] = Counter()
    last, below = 0, 0.0
    for most, count in counts:
        size = max(1, round((last + 1 + most) / 2))
        sizes[size] += round((count - below) / size)
        last, below = most, count
    return Counter({size: count for size, count in sizes.items() if count > 0})


def _children(pid: int) -> list[int]:
    return [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]


def _busy(pid: int) -> tuple[float, float]:
    """Processor seconds of the server and of its model's process."""

    def of(one: int) -> float:
        parts = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
        return (int(parts[11]) + int(parts[12])) / 100

    return of(pid), sum(map(of, _children(pid)))


def _resident(pid: int) -> tuple[float, float]:
    """MiB of the server and of its model's process."""

    def of(one: int) -> float:
        return next(
            int(line.split()[1]) / 1024
            for line in Path(f"/proc/{one}/status").read_text().splitlines()
            if line.startswith("VmRSS")
        )

    return of(pid), sum(map(of, _children(pid)))


@contextmanager
def _server(bundle: Path, keys: list[str]) -> Iterator[tuple[int, int]]:
    line = [
        sys.executable,
        str(ROOT / "commands.py"),
        "serve",
        str(bundle.resolve()),
        "--port",
        "0",
        "request_log=false",
        *keys,
    ]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        if not said.startswith("serving"):
            sys.exit("the server did not start")
        yield process.pid, int(said.rpartition(":")[2])
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


if __name__ == "__main__":
    main()
