"""Measure a service: requests per second, and latencies at half of that load.

    python scripts/bench/service.py --model runs/NAME/model --data-dir data/SST-2

Prints JSON. It starts and ends `sst2-xlmr serve`. A request is one sentence of dev.tsv. First 32 clients
ask again as soon as they have their answer, for --seconds: `requests_per_s`. Then requests begin at random times, half
as many a second, whether earlier ones are answered or not: `p50_ms`, `p99_ms`.
"""

import asyncio
import json
import random
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from inputs import ROOT, SAMPLE_DATA, read_rows

from sst2_xlmr.cli import OneLineParser, positive
from sst2_xlmr.config import PRECISIONS
from sst2_xlmr.util.errors import exit_on_user_error

CLIENTS = 32


async def ask(port: int, text: str, free: list[Any]) -> float:
    """Return the milliseconds that an answer took, over a free connection or a new one; it must not be refused."""
    started = time.monotonic()
    while free and free[-1][0].at_eof():  # it was idle for too long
        free.pop()
    reader, writer = free.pop() if free else await asyncio.open_connection("127.0.0.1", port)
    body = json.dumps({"texts": [text]}).encode()
    writer.write(f"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    assert b" 200 " in head.splitlines()[0], head
    await reader.readexactly(int(head.partition(b"content-length:")[2].split()[0]))
    free.append((reader, writer))
    return (time.monotonic() - started) * 1000


async def measure(port: int, texts: list[str], seconds: int) -> dict[str, Any]:
    free, answered = list[Any](), 0
    for text in texts[:20]:
        await ask(port, text, free)

    async def ask_again(until: float) -> None:
        nonlocal answered
        while time.monotonic() < until:
            await ask(port, random.choice(texts), free)
            answered += 1

    started = time.monotonic()
    await asyncio.gather(*(ask_again(started + seconds) for _ in range(CLIENTS)))
    rate = answered / (time.monotonic() - started)

    waiting, until = [], time.monotonic() + seconds
    while time.monotonic() < until:
        waiting.append(asyncio.create_task(ask(port, random.choice(texts), free)))
        await asyncio.sleep(random.expovariate(rate / 2))
    p50, p99 = np.percentile(await asyncio.gather(*waiting), [50, 99]).round(1).tolist()
    return {"requests_per_s": round(rate), "p50_ms": p50, "p99_ms": p99, "requests": answered + len(waiting)}


def main() -> None:
    parser = OneLineParser(description="Measure a service; prints JSON.", allow_abbrev=False)
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="model folder to serve")
    add("--precision", default="auto", choices=PRECISIONS, help="of the model [auto]")
    add("--data-dir", default=SAMPLE_DATA, type=Path, metavar="DIR", help="dev.tsv [sample_data]")
    add("--seconds", type=positive, default=20, metavar="N", help="of each part [20]")
    arguments = parser.parse_args()
    texts = [line.split("\t")[0] for line in read_rows(arguments.data_dir / "dev.tsv")]
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    options = ["--model", arguments.model, "--precision", arguments.precision, "--port", str(port)]
    service = subprocess.Popen([sys.executable, ROOT / "scripts" / "serve.py", *options])
    try:
        while service.poll() is None and socket.socket().connect_ex(("127.0.0.1", port)):
            time.sleep(0.2)
        print(json.dumps(asyncio.run(measure(port, texts, arguments.seconds)), indent=1))
    finally:
        service.terminate()
        service.wait()


if __name__ == "__main__":
    exit_on_user_error(main)
