"""``zimg-run serve`` under load: pictures a second beside a loop without a server, and beside a diffusers server.

Then clients of every kind at once: those that hang up, that send nonsense or far too much, that read slowly. Each
picture is compared with the one that a pipeline draws from its seed. A carried model, on the loopback address. Exits
with 1 where a picture was lost or another's, an error was the server's own, memory grew, or the server costs 5 % of
the pictures a second.

    python benchmarks/serve_load.py --json benchmarks/results/serve_load.json
    python benchmarks/serve_load.py --clients 1 8 --seconds 30 --repeats 1
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import common
import httpx

MODEL = "zimg-tiny-z"
PROMPT = "a red circle left of a blue square"
SEEDS = 16
KINDS = {"picture": 70, "stream": 10, "hang up": 8, "nonsense": 6, "too large": 2, "slow reader": 4}
"""What clients do, and how often of a hundred times."""
LARGE = 80 << 20
GROWTH, COST = 0.10, 0.05
"""Bounds: of the resident memory, and of pictures a second."""


def digest(png: bytes) -> str:
    """Of a picture's pixels."""
    from PIL import Image

    return hashlib.sha256(Image.open(BytesIO(png)).convert("RGB").tobytes()).hexdigest()


class Loop:
    """The loop without a server: a pipeline whose pictures become files."""

    def __init__(self, steps: int) -> None:
        from zimgkit.runtime import Pipeline

        self.pipeline, self.steps = Pipeline.open(MODEL, backend="onnxruntime"), steps
        self.expected = [digest(self.draw(seed)) for seed in range(SEEDS)]

    def draw(self, seed: int) -> bytes:
        """A picture's file."""
        data = BytesIO()
        picture = self.pipeline(PROMPT, seed=seed, num_inference_steps=self.steps).images[0]
        picture.save(data, "PNG")
        return data.getvalue()

    def rate(self, seconds: float) -> float:
        """Pictures a second."""
        started, drawn = time.perf_counter(), 0
        while (taken := time.perf_counter() - started) < seconds:
            self.draw(drawn % SEEDS)
            drawn += 1
        return drawn / taken


@contextmanager
def server(*command: str | Path) -> Iterator[str]:
    """A server in a process of its own, and its address."""
    with subprocess.Popen([sys.executable, *command], stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr
            lines = []
            for line in process.stderr:
                lines.append(line)
                if found := re.search(r"ready: (http://[^\s/]+)", line):
                    os.set_blocking(process.stderr.fileno(), False)
                    break
            else:
                raise SystemExit(f"{command} did not start:\n{''.join(lines)}")
            yield found[1]
        finally:
            process.terminate()
            process.wait(60)


async def rate(url: str, clients: int, seconds: float, steps: int) -> tuple[float, list[float]]:
    """Pictures a second of a server, and how long each took."""
    times: list[float] = []

    async def one(client: httpx.AsyncClient, number: int) -> None:
        while time.perf_counter() < deadline:
            before = time.perf_counter()
            body = {"prompt": PROMPT, "seed": number % SEEDS, "num_inference_steps": steps}
            (await client.post(f"{url}/v1/images/generations", json=body)).raise_for_status()
            times.append(time.perf_counter() - before)

    async with httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=clients)) as client:
        started = time.perf_counter()
        deadline = started + seconds
        await asyncio.gather(*(one(client, number) for number in range(clients)))
    return len(times) / (time.perf_counter() - started), times


class Crowd:
    """Clients of every kind."""

    def __init__(self, url: str, expected: Sequence[str], steps: int) -> None:
        self.url, self.expected, self.steps = url, expected, steps
        self.host, _, port = url.removeprefix("http://").partition(":")
        self.port = int(port)
        self.rng = random.Random(0)
        self.counts: Counter[str] = Counter()
        self.wrong: Counter[str] = Counter()
        self.times: list[float] = []

    async def run(self, clients: int, seconds: float) -> None:
        """So many at once, for so long."""
        self.times = []
        async with httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=2 * clients)) as client:
            deadline = time.perf_counter() + seconds

            async def one() -> None:
                while time.perf_counter() < deadline:
                    kind = self.rng.choices(list(KINDS), list(KINDS.values()))[0]
                    self.counts[kind] += 1
                    await getattr(self, f"_{kind.replace(' ', '_')}")(client)

            await asyncio.gather(*(one() for _ in range(clients)))

    def _body(self, **more: Any) -> tuple[int, dict[str, Any]]:
        seed = self.rng.randrange(SEEDS)
        return seed, {"prompt": PROMPT, "seed": seed, "num_inference_steps": self.steps, **more}

    def _check(self, seed: int, entry: Mapping[str, Any]) -> None:
        if digest(base64.b64decode(entry["b64_json"])) != self.expected[seed]:
            self.wrong["another picture"] += 1

    async def _picture(self, client: httpx.AsyncClient) -> None:
        seed, body = self._body()
        before = time.perf_counter()
        answer = await client.post(f"{self.url}/v1/images/generations", json=body)
        if answer.status_code == 429:
            self.counts["refused with 429"] += 1
            await asyncio.sleep(float(answer.headers["retry-after"]))
        elif answer.status_code != 200:
            self.wrong[f"status {answer.status_code} for a picture"] += 1
        else:
            self.times.append(time.perf_counter() - before)
            self._check(seed, answer.json()["data"][0])

    async def _stream(self, client: httpx.AsyncClient) -> None:
        seed, body = self._body(stream=True, partial_images=1)
        last: dict[str, Any] = {}
        async with client.stream("POST", f"{self.url}/v1/images/generations", json=body) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    last = json.loads(line[6:])
        if last.get("type") == "image_generation.completed":
            self._check(seed, last)
        elif answer.status_code != 429:
            self.wrong[f"a stream that ended with {last.get('type')}"] += 1

    async def _hang_up(self, client: httpx.AsyncClient) -> None:
        _, body = self._body(stream=self.rng.random() < 0.5)
        _, writer = await self._send(json.dumps(body).encode())
        await asyncio.sleep(self.rng.random() * 0.3)
        writer.transport.abort()

    async def _nonsense(self, client: httpx.AsyncClient) -> None:
        bodies = (b"{", b"[]", b'{"prompt": ""}', b'{"prompt": "a", "n": 99}', b'{"prompt": "a", "size": "7x7"}')
        answer = await client.post(f"{self.url}/v1/images/generations", content=self.rng.choice(bodies))
        if answer.status_code != 400:
            self.wrong[f"status {answer.status_code} for nonsense"] += 1

    async def _too_large(self, client: httpx.AsyncClient) -> None:
        reader, writer = await self._send(b"{", LARGE)
        answer = await reader.read(100)
        writer.transport.abort()
        if not answer.startswith(b"HTTP/1.1 413"):
            self.wrong["too large a body was taken"] += 1

    async def _slow_reader(self, client: httpx.AsyncClient) -> None:
        seed, body = self._body()
        reader, writer = await self._send(json.dumps(body).encode())
        data = b""
        while chunk := await reader.read(2048):
            data += chunk
            await asyncio.sleep(0.02)
        writer.close()
        head, _, text = data.partition(b"\r\n\r\n")
        if head.startswith(b"HTTP/1.1 200"):
            self._check(seed, json.loads(text)["data"][0])
        elif not head.startswith(b"HTTP/1.1 429"):
            self.wrong["a slow reader got nothing"] += 1

    async def _send(self, body: bytes, length: int | None = None) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection(self.host, self.port)
        head = f"POST /v1/images/generations HTTP/1.1\r\nHost: {self.host}\r\nConnection: close\r\n"
        writer.write(f"{head}Content-Length: {length or len(body)}\r\n\r\n".encode() + body)
        await writer.drain()
        return reader, writer


def resident(url: str) -> float:
    """The server's memory, in MiB."""
    found = re.search(r"^process_resident_memory_bytes (\S+)", httpx.get(f"{url}/metrics").text, re.MULTILINE)
    return float(found[1]) / 2**20 if found else float("nan")


def measure(options: Any) -> dict[str, Any]:
    """Run all of it."""
    loop, steps, turn = Loop(options.steps), options.steps, options.turn_seconds
    own = ("-m", "zimgkit.runtime", "serve", "--port", "0", "--bundle", MODEL, "--backend", "onnxruntime")
    rates: dict[str, list[float]] = {"loop": [], "server, 1 client": [], "server, 8 clients": []}
    with server(*own, "--no-access-log", "--max-queue-seconds", "3600") as url:
        with server(Path(__file__).with_name("serve_diffusers.py"), MODEL) as peer:
            rates |= {"diffusers server, 1 client": [], "diffusers server, 8 clients": []}
            for _ in range(options.repeats):
                rates["loop"].append(loop.rate(turn))
                for name, where in (("server", url), ("diffusers server", peer)):
                    for clients, called in ((1, "1 client"), (8, "8 clients")):
                        rates[f"{name}, {called}"].append(asyncio.run(rate(where, clients, turn, steps))[0])
        crowd, levels, memory = Crowd(url, loop.expected, steps), [], []
        seconds = options.seconds / len(options.clients) / 2
        for clients in (
            *options.clients,
            *options.clients,
        ):  # Twice: what the first round holds, the second may not add to.
            asyncio.run(crowd.run(clients, seconds))
            memory.append(resident(url))
            taken = sorted(crowd.times)
            levels.append({"clients": clients, "pictures": len(taken), **_percentiles(taken), "mib": memory[-1]})
            print(f"  {levels[-1]}", file=sys.stderr)
        healthy = httpx.get(f"{url}/health/ready").status_code == 200
    half = len(options.clients)
    return {
        "steps": steps,
        "pictures_a_second": {name: [round(value, 2) for value in found] for name, found in rates.items()},
        "levels": levels,
        "clients": dict(crowd.counts),
        "wrong": dict(crowd.wrong) | ({} if healthy else {"not ready at the end": 1}),
        "memory_growth": round(max(memory[half:]) / max(memory[:half]) - 1, 3),
    }


def _percentiles(taken: Sequence[float]) -> dict[str, float]:
    if not taken:
        return {}
    at = lambda share: round(taken[min(len(taken) - 1, int(share * len(taken)))], 3)  # noqa: E731
    return {"p50": at(0.5), "p99": at(0.99)}


def report(result: Mapping[str, Any]) -> int:
    """Print a result; the exit code."""
    medians = {name: statistics.median(found) for name, found in result["pictures_a_second"].items()}
    rows = [(name, f"{value:.2f}", f"{value / medians['loop']:.3f}") for name, value in medians.items()]
    print(common.table(("", "pictures a second", "of the loop"), rows), "\n")
    rows = [
        tuple(str(level.get(key, "")) for key in ("clients", "pictures", "p50", "p99", "mib"))
        for level in result["levels"]
    ]
    print(common.table(("clients", "pictures", "p50 s", "p99 s", "resident MiB"), rows), "\n")
    print(", ".join(f"{count} {kind}" for kind, count in result["clients"].items()), "\n")
    for what, count in result["wrong"].items():
        print(f"WRONG   {what}: {count}")
    pairs = result["pictures_a_second"]
    cost = statistics.median(
        1 - one / other for one, other in zip(pairs["server, 8 clients"], pairs["loop"], strict=True)
    )
    bounds = (
        ("what is wrong", sum(result["wrong"].values()), 1),
        ("growth of the memory", result["memory_growth"], GROWTH),
        ("what a server costs of pictures a second", cost, COST),
    )
    return common.broken_bounds(bounds)


def main() -> int:
    """The script."""
    parser = common.parser(__doc__, family=False, folder=False)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64], help="at once [default: 1 4 16 64]")
    parser.add_argument("--seconds", type=float, default=600, help="of clients of every kind [default: 600]")
    parser.add_argument("--turn-seconds", type=float, default=10, help="of each turn of a rate [default: 10]")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each [default: 5]")
    parser.add_argument("--steps", type=int, default=8, help="of each picture [default: 8]")
    options = parser.parse_args()
    facts, result = common.machine(), measure(options)
    common.save(options.json, facts, result)
    return report(result)


if __name__ == "__main__":
    common.start(main)
