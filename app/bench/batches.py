"""A batch of many lines from its file to its answers: lines a second, and the most memory that each
part took meanwhile.

Models do nothing (engine `stub`). With `--kill` the API, rescue and the worker are killed and
started again, one after the other, while it runs. At the end every line has to have one answer.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import httpx

from app.bench.mill import MODEL, Mill
from app.bench.report import machine, print_json, print_table

URL: Final = "/v1/embeddings"
LOOK_S: Final = 0.5
PARTS: Final = ("api", "rescue", "worker")


def main(arguments: Seq[str]) -> None:
    options = _parser().parse_args(arguments)
    with tempfile.NamedTemporaryFile(suffix=".jsonl") as file, Mill(64, 1.0) as mill:
        _write(Path(file.name), options.lines, options.bytes)
        size = Path(file.name).stat().st_size
        [url] = mill.start_apis(1)
        mill.start_rescue(1)
        mill.grow(1)
        before = mill.memory()
        with _watched(mill) as most:
            batch, seconds = _run(mill, url, Path(file.name), options.kill)
            answers = _read(mill, url, batch, options.lines)
    _tell(options, size, seconds, before, most, batch, answers)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m app.bench batches", description=__doc__)
    parser.add_argument("--lines", type=int, default=50_000)
    parser.add_argument("--bytes", type=int, default=500, help="of the text of a line")
    parser.add_argument("--kill", action="store_true", help="kill each part once, meanwhile")
    return parser


def _write(file: Path, lines: int, num_bytes: int) -> None:
    text = ("grist " * (num_bytes // 6 + 1))[:num_bytes]
    with file.open("w") as out:
        for number in range(lines):
            body = {"model": MODEL, "input": f"{number} {text}"}
            line = {"custom_id": str(number), "method": "POST", "url": URL, "body": body}
            out.write(json.dumps(line) + "\n")


@contextmanager
def _watched(mill: Mill) -> Iterator[dict[str, float]]:
    """The most that each part had at a time, in MB."""
    most: dict[str, float] = defaultdict(float)
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.05):
            for part, size in mill.memory().items():
                most[part] = max(most[part], size)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield most
    finally:
        over.set()
        thread.join()


def _run(mill: Mill, url: str, file: Path, kill: bool) -> tuple[dict[str, Any], float]:
    """The batch, ended, and how long it took from its upload on."""
    headers = {"Authorization": f"Bearer {mill.key}"}
    left = list(PARTS) if kill else []
    with httpx.Client(base_url=url, headers=headers, timeout=120) as client:
        began = time.monotonic()
        with file.open("rb") as data:
            form = {"file": ("in.jsonl", data)}
            made = client.post("/v1/files", files=form, data={"purpose": "batch"})
        made.raise_for_status()
        print(f"uploaded in {time.monotonic() - began:.1f} s", flush=True)
        asked = {"input_file_id": made.json()["id"], "endpoint": URL, "completion_window": "24h"}
        batch: dict[str, Any] = client.post("/v1/batches", json=asked).json()
        while batch["status"] not in ("completed", "failed", "expired"):
            time.sleep(LOOK_S)
            with suppress(httpx.TransportError):
                batch = client.get(f"/v1/batches/{batch['id']}").json()
            counts = batch["request_counts"]
            done = counts["completed"] + counts["failed"]
            if left and counts["total"] and done > counts["total"] * (1 - 0.25 * len(left)):
                print(f"kill {left[0]} at {done:,} lines", flush=True)
                mill.kill(left.pop(0))
        return batch, time.monotonic() - began


def _read(mill: Mill, url: str, batch: dict[str, Any], lines: int) -> int:
    """Lines of the output, each once."""
    headers = {"Authorization": f"Bearer {mill.key}"}
    path = f"{url}/v1/files/{batch['output_file_id']}/content"
    found = set()
    number = 0
    with httpx.stream("GET", path, headers=headers, timeout=120) as answer:
        for line in answer.iter_lines():
            found.add(json.loads(line)["custom_id"])
            number += 1
    assert number == len(found) == lines, f"{number} lines, {len(found)} ids"
    return number


def _tell(
    options: argparse.Namespace,
    size: int,
    seconds: float,
    before: dict[str, float],
    most: dict[str, float],
    batch: dict[str, Any],
    answers: int,
) -> None:
    print(f"{machine()}\n{options.lines:,} lines, {size / 1e6:.0f} MB, {batch['status']}: ", end="")
    print(f"{answers:,} answers in {seconds:.1f} s, {options.lines / seconds:,.0f} lines/s\n")
    rows = [[part, f"{before[part]:.0f}", f"{most[part]:.0f}"] for part in PARTS]
    print_table(["part", "MB before", "MB at most"], rows)
    print_json(
        "batches",
        {
            "lines_per_s": round(options.lines / seconds, 1),
            "api_growth_mb": round(most["api"] - before["api"], 1),
            "rescue_growth_mb": round(most["rescue"] - before["rescue"], 1),
        },
    )
    assert batch["request_counts"] == {
        "total": options.lines,
        "completed": options.lines,
        "failed": 0,
    }
