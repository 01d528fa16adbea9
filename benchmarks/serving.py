"""Latency over HTTP at a steady rate: another process sends requests to `foretaste serve`.

Users take turns, so every answer encodes a history again. Requests are sent on time whether or not
earlier ones were answered, so a slow answer does not hide the wait of later ones.

    python benchmarks/serving.py BUNDLE --rate 50 --seconds 30 --out benchmarks/results/serving.json

With `--behind-it din`, a DIN ranks 200 candidates of the bundle's retriever, with the last 50
events. Its weights are not trained, which does not change the time. The server itself reports the
mean of each stage.
"""

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import foretaste as ft
from foretaste.experiment.record import run_facts
from foretaste.models.catalogue import build_model


def main() -> None:
    options = parse()
    recommender = ft.load(options.bundle)
    events, kind = recommender.trained.events, recommender.trained.config.kind
    length_U = np.diff(events.offsets)
    longest = np.argsort(-length_U, kind="stable")[: options.users]
    users = [str(user_id) for user_id in events.users.ids.gather(longest).to_list()]
    stages: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        bundle = options.bundle
        if options.behind_it:
            bundle, kind = Path(folder) / "bundle", f"{kind} and {options.behind_it}"
            ft.build_recommender(two_stages(recommender.trained)).save(bundle)
        process, address = start(bundle, Path(folder))
        try:
            asyncio.run(load(address, users, rate=options.rate, seconds=3, k=options.k))
            seconds = asyncio.run(
                load(address, users, rate=options.rate, seconds=options.seconds, k=options.k)
            )
            stages = stage_ms(address)
        finally:
            process.terminate()
            process.wait()
    report = summary(seconds, options, kind, median_history=int(np.median(length_U[longest])))
    report["stages_mean_ms"] = stages
    print(json.dumps(report, indent=2))
    if options.out:
        options.out.write_text(json.dumps(report, indent=2) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rate", type=float, default=50.0, help="requests a second")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--users", type=int, default=1000, help="those with the most events")
    parser.add_argument("-k", type=int, default=20)
    parser.add_argument("--behind-it", choices=("din",), help="an untrained ranker of 200 items")
    parser.add_argument("--out", type=Path, help="write a dated JSON report")
    return parser.parse_args()


def two_stages(retriever: ft.Trained) -> ft.Trained:
    """Put a DIN with initial weights behind a trained retriever."""
    config, events = ft.DINConfig(max_len=50), retriever.events
    torch.manual_seed(0)
    model = build_model(
        config,
        num_users=events.num_users,
        num_items=events.num_items,
        features=retriever.features,
    )
    model.begin(events)
    ranker = replace(retriever, config=config, model=model.eval())
    return ft.two_stage(retriever, ranker, candidates=200)


def stage_ms(address: str) -> dict[str, float]:
    """Return the mean time of each stage over all answers, as the server measured it."""
    with urllib.request.urlopen(f"{address.rstrip('/')}/metrics") as reply:
        text = reply.read().decode()
    found = re.findall(r'foretaste_stage_seconds_(sum|count)\{stage="(\w+)"\} (\S+)', text)
    values = {(what, stage): float(value) for what, stage, value in found}
    return {
        stage: 1000 * total / values["count", stage]
        for (what, stage), total in values.items()
        if what == "sum"
    }


def start(bundle: Path, folder: Path) -> tuple[subprocess.Popen[str], str]:
    """Start the server on a free port, and wait until it is ready."""
    state = f"sqlite:///{folder / 'events.sqlite'}"
    words = ["-m", "foretaste.cli.main", "serve", str(bundle), "--port", "0", "--state", state]
    process = subprocess.Popen(
        [sys.executable, *words, "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    line = process.stdout.readline() if process.stdout else ""
    return process, str(json.loads(line)["address"])


async def load(address: str, users: list[str], *, rate: float, seconds: float, k: int) -> list:
    """Return the seconds of each answer."""
    took: list[float] = []
    idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
    host, _, port = address.strip("/").rpartition("/")[2].rpartition(":")

    async def ask(user_id: str) -> None:
        begun = time.perf_counter()
        reader, writer = idle.pop() if idle else await asyncio.open_connection(host, int(port))
        writer.write(request(host, {"user_id": user_id, "k": k}))
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        await reader.readexactly(int(head.partition("content-length: ")[2].partition("\r\n")[0]))
        took.append(time.perf_counter() - begun)
        if not head.startswith("http/1.1 200"):
            raise RuntimeError(f"the server answered {head}")
        idle.append((reader, writer))

    begun, asked = time.perf_counter(), []
    for number in range(int(rate * seconds)):
        await asyncio.sleep(max(0.0, begun + number / rate - time.perf_counter()))
        asked.append(asyncio.create_task(ask(users[number % len(users)])))
    await asyncio.gather(*asked)
    for _, writer in idle:
        writer.close()
    return took


def request(host: str, asked: dict[str, object]) -> bytes:
    """Return the bytes of a request.

    They are written by hand, because a client library takes a third of the server's time for an
    answer, on the same cores.
    """
    body = json.dumps(asked).encode()
    head = f"POST /v1/recommend HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def summary(
    took: list[float], options: argparse.Namespace, kind: str, *, median_history: int
) -> dict[str, object]:
    p50, p95, p99 = (1000 * float(np.percentile(took, p)) for p in (50, 95, 99))
    work = f"an answer over HTTP, {kind} on ML-1M, k = {options.k}, {options.rate:g} requests/s"
    return {
        "benchmark": "serving",
        **run_facts(threads=1, packages=("fastapi", "uvicorn")),  # a request has one core
        "load_average": os.getloadavg(),
        "median_history": median_history,
        "answers": len(took),
        "p50_ms": p50,
        "p95_ms": p95,
        "p99_ms": p99,
        "readme": [[work, f"p50 {p50:.1f} ms, p99 {p99:.1f} ms", ""]],
    }


if __name__ == "__main__":
    main()
