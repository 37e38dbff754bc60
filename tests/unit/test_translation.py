"""Translation: languages by request, and tokenizers of all kinds of translators."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, M2M100Tokenizer, MarianTokenizer

from app.config.settings import ModelSettings
from app.engines.base import Engine, Generation, Sequence
from app.engines.checkpoint.languages import find_languages
from app.engines.registry import create
from app.engines.text.tokenizer import Tokenizer, load_tokenizer
from app.errors import RequestError
from app.jobs import FinishReason, Kind, SamplingParams
from app.requests import replies
from app.requests.bodies import Url, parse
from app.requests.prepare import prepare
from tests.unit import tiny_translators
from tests.unit.tiny_translators import ENGLISH, GERMAN

pytestmark = pytest.mark.filterwarnings("ignore:Recommended. pip install sacremoses")

MADE: dict[str, Callable[[Path], Path]] = {
    "marian": tiny_translators.save_marian,
    "marian-many": lambda folder: tiny_translators.save_marian(folder, ["fra", "ita", "zho_Hans"]),
    "m2m_100": tiny_translators.save_m2m100,
    "nllb": tiny_translators.save_nllb,
    "mbart": lambda folder: tiny_translators.save_mbart(folder, fifty=False),
    "mbart50": lambda folder: tiny_translators.save_mbart(folder, fifty=True),
}


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: make(tmp_path_factory.mktemp(kind) / "model") for kind, make in MADE.items()}


def tokenizer_of(folder: Path) -> Tokenizer:
    return load_tokenizer(
        folder, ModelSettings(source=str(folder), kind=Kind.GENERATE, engine="generate")
    )


TEXTS = st.one_of(
    st.sampled_from([*ENGLISH, *GERMAN]),
    st.text(max_size=40),
    st.text(alphabet="the mill wW▁.,  üß</s>", max_size=30),
)


@pytest.mark.parametrize("kind", ["marian", "m2m_100"])
def test_texts_become_the_pieces_that_transformers_finds(
    kind: str, folders: dict[str, Path]
) -> None:
    ours = tokenizer_of(folders[kind])
    made = MarianTokenizer if kind == "marian" else M2M100Tokenizer
    theirs: Any = made.from_pretrained(folders[kind])
    special = [*theirs.all_special_tokens, ">>", *theirs.added_tokens_encoder]
    source = ours.languages.direction("en", None if kind == "marian" else "de")

    @given(TEXTS)
    def check(text: str) -> None:
        ids = ours.encode_source(text, source)
        if not any(it in text for it in special):  # a user's text has none
            assert [*ids] == theirs(text).input_ids
        assert not {*ids[1:-1]} & {*ours.special}.difference([theirs.unk_token_id])
        assert max(ids) < ours.vocab_size

    check()


@pytest.mark.parametrize("kind", ["marian", "m2m_100"])
def test_an_outputs_text_is_the_one_that_transformers_gives(
    kind: str, folders: dict[str, Path]
) -> None:
    from app.engines.text.stopping import Output

    ours = tokenizer_of(folders[kind])
    theirs: Any = AutoTokenizer.from_pretrained(folders[kind], tgt_lang="de")
    for text in GERMAN:
        ids = theirs(text_target=text).input_ids
        output = Output(SamplingParams(len(ids), ignore_eos=True), ours, [5])
        for token in ids:
            output.append(token)

        assert output.text == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("kind", "source", "target"),
    [
        ("m2m_100", "de", "fr"),
        ("nllb", "deu_Latn", "fra_Latn"),
        ("mbart", "de_DE", "fr_XX"),
        ("mbart50", "de_DE", "fr_XX"),
    ],
)
def test_a_source_has_the_tokens_that_transformers_puts_around_it(
    kind: str, source: str, target: str, folders: dict[str, Path]
) -> None:
    ours = tokenizer_of(folders[kind])
    theirs: Any = AutoTokenizer.from_pretrained(folders[kind], src_lang=source, tgt_lang=target)
    expected = theirs.convert_tokens_to_ids(f"__{target}__" if kind == "m2m_100" else target)

    direction = ours.languages.direction(source, target)
    params = direction.applied(SamplingParams(5))

    for text in GERMAN:
        assert [*ours.encode_source(text, direction)] == theirs(text).input_ids
    begins = (params.decoder_start_token_id, params.forced_bos_token_id)
    assert begins == ((expected, None) if kind == "mbart" else (None, expected))


def test_a_marian_of_many_targets_is_told_by_a_token(folders: dict[str, Path]) -> None:
    ours = tokenizer_of(folders["marian-many"])
    theirs: Any = MarianTokenizer.from_pretrained(folders["marian-many"])
    text = ENGLISH[0]

    direction = ours.languages.direction("en", "fra")

    assert [*ours.encode_source(text, direction)] == theirs(f">>fra<< {text}").input_ids
    assert ours.languages.names == ["fra", "ita", "zho_Hans"]
    assert [*ours.encode_text(f">>fra<< {text}", parse_special=True)] == (
        theirs(f">>fra<< {text}").input_ids
    )


@pytest.mark.parametrize(
    ("kind", "source", "target", "param", "says"),
    [
        ("marian", "fr", None, "source_language", "This model's source_language is en."),
        ("marian", None, "fr", "target_language", "This model's target_language is de."),
        ("marian-many", "en", None, "target_language", "needs a target_language: fra, ita, zho"),
        ("nllb", "deu_Latn", "fr", "target_language", "has no language so called; give one of"),
        ("nllb", "zho", "fra_Latn", "source_language", "give one of zho_Hans, zho_Hant"),
        ("mbart", "de_DE", None, "target_language", "This model needs a target_language"),
    ],
)
def test_a_language_that_is_unknown_or_missing_is_named(
    kind: str,
    source: str | None,
    target: str | None,
    param: str,
    says: str,
    folders: dict[str, Path],
) -> None:
    with pytest.raises(RequestError) as refused:
        tokenizer_of(folders[kind]).languages.direction(source, target)

    assert refused.value.param == param
    assert says in refused.value.message


def test_a_language_may_be_called_by_the_part_that_names_it(folders: dict[str, Path]) -> None:
    languages = tokenizer_of(folders["nllb"]).languages

    assert languages.direction("deu", "FRA_latn") == languages.direction("deu_Latn", "fra_Latn")


T5 = {
    "model_type": "t5",
    "task_specific_params": {
        "summarization": {"prefix": "summarize: ", "num_beams": 4},
        "translation_en_to_de": {
            "prefix": "translate English to German: ",
            "num_beams": 4,
            "early_stopping": True,
            "max_length": 300,
        },
        "translation_en_to_fr": {"prefix": "translate English to French: ", "num_beams": 2},
    },
}


def test_a_t5_is_told_by_its_tasks_sentence_and_searches_as_the_task_says(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(T5))
    languages = find_languages(tmp_path, {}, 1)

    german = languages.direction("en", "de")

    assert german.prefix == "translate English to German: "
    assert german == languages.direction("English", "german")
    assert languages.direction(None, "fr").prefix == "translate English to French: "
    assert languages.names == ["de", "fr"]
    own = german.applied(SamplingParams(5))
    assert (own.num_beams, own.early_stopping) == (4, True)
    assert german.applied(SamplingParams(5, num_beams=1)).num_beams == 1
    assert german.applied(SamplingParams(5, early_stopping=False)).early_stopping is False
    with pytest.raises(RequestError, match="needs a target_language: French, German, de, fr"):
        languages.direction("en", None)


def test_a_madlad_is_told_by_a_token_before_the_source(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    languages = find_languages(tmp_path, {"<2de>": 7, "<2fr>": 8, "the": 9}, 2)

    assert languages.direction(None, "fr").around == ((8,), (2,))


def test_a_model_without_languages_takes_none(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bart"}')
    languages = find_languages(tmp_path, {}, 2)

    assert languages.direction(None, None).around is None
    with pytest.raises(RequestError, match="name no languages: leave them out"):
        languages.direction("en", None)


STUB = ModelSettings(source="stub", kind=Kind.TRANSLATE, engine="stub")


def test_an_input_with_a_language_is_a_translation() -> None:
    by_field = parse({"input": ["flour", "meal"], "target_language": "deu_Latn", "n": 2})
    by_model = parse({"input": "flour", "model": "m"}, kind_of={"m": Kind.TRANSLATE}.get)

    assert by_field.url == by_model.url == Url.TRANSLATIONS
    assert by_field.num_sequences == 4
    assert parse({"input": "flour"}).url == Url.EMBEDDINGS


def test_a_translation_is_the_likeliest_one_unless_draws_are_asked_for() -> None:
    tokenizer = load_tokenizer(Path(), STUB)

    plain, drawn = (
        prepare(parse({"input": "flour", "target_language": "de"} | more), tokenizer, STUB)
        for more in ({}, {"temperature": 0.7, "seed": 3})
    )

    assert plain.params and drawn.params
    assert (plain.params.temperature, plain.params.num_beams) == (0.0, None)
    assert (drawn.params.temperature, drawn.params.num_beams) == (0.7, 1)
    assert bytes(plain.prompts[0]) == b">de: flour"


def test_an_answer_is_a_choice_for_each_text() -> None:
    request = parse({"input": ["flour", "meal"], "target_language": "de"})
    given = [
        Generation(i, FinishReason.STOP, [65], text, input_tokens=4) for i, text in enumerate("ab")
    ]

    body = replies.body(
        request,
        given,
        job_id="7",
        model="m",
        created=1,
        tokenizer=load_tokenizer(Path(), STUB),
        prompts=[(1,), (2,)],
    )

    assert body == {
        "id": "trans-7",
        "object": "translation",
        "created": 1,
        "model": "m",
        "choices": [
            {"index": 0, "text": "a", "finish_reason": "stop"},
            {"index": 1, "text": "b", "finish_reason": "stop"},
        ],
        "usage": {
            "prompt_tokens": 8,
            "completion_tokens": 2,
            "total_tokens": 10,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }


def engine_of(folder: Path) -> Engine:
    given = ModelSettings(
        source=str(folder), kind=Kind.TRANSLATE, engine="generate", dtype="float32"
    )
    return create("generate", folder, given, device="cpu", threads=1, progress=lambda: None)


def translated(folder: Path, *bodies: dict[str, Any]) -> list[dict[str, Any]]:
    """The responses to requests that are in one batch, from their bodies on."""
    settings = ModelSettings(
        source=str(folder), kind=Kind.TRANSLATE, engine="generate", default_max_tokens=20
    )
    tokenizer = load_tokenizer(folder, settings)
    asked = [parse(body, "/v1/translations") for body in bodies]
    prepared = [prepare(request, tokenizer, settings) for request in asked]
    engine = engine_of(folder)
    sequences: list[list[Sequence]] = []
    for request, each in zip(asked, prepared, strict=True):
        first, answers = sum(map(len, sequences)), request.num_answers
        sequences.append(
            [
                Sequence(first + i, each.prompts[i // answers], each.sampling(i % answers))
                for i in range(request.num_sequences)
            ]
        )
    engine.admit("batch", [each for part in sequences for each in part])
    ended: dict[int, Generation] = {}
    while engine.has_work:
        ended |= {each.sequence_id: each for each in engine.step()}
    return [
        replies.body(
            request,
            [ended[each.id] for each in part],
            job_id="1",
            model="m",
            created=1,
            tokenizer=tokenizer,
            prompts=each_prepared.prompts,
        )
        for request, part, each_prepared in zip(asked, sequences, prepared, strict=True)
    ]


def expected(
    folder: Path, text: str, source: str | None = None, target: str | None = None, **how: Any
) -> tuple[list[str], int]:
    """Texts that transformers gives for a source alone, and their tokens in all."""
    model: Any = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, src_lang=source)
    if target:
        token = f"__{target}__" if len(target) == 2 else target
        begin = tokenizer.convert_tokens_to_ids(token)
        is_older = type(tokenizer).__name__ == "MBartTokenizer"
        how["decoder_start_token_id" if is_older else "forced_bos_token_id"] = begin
    ids = tokenizer(text, return_tensors="pt").input_ids
    outs = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, **how)
    tokens, end = outs[:, 1:].tolist(), model.config.eos_token_id
    num_tokens = sum(out.index(end) + 1 if end in out else len(out) for out in tokens)
    return tokenizer.batch_decode(outs, skip_special_tokens=True), num_tokens


DIRECTIONS: dict[str, list[tuple[str | None, str | None]]] = {
    "marian": [("en", "de"), (None, None)],
    "m2m_100": [("en", "de"), ("de", "fr"), ("fr", "en")],
    "nllb": [("eng_Latn", "deu_Latn"), ("deu_Latn", "fra_Latn")],
    "mbart": [("en_XX", "de_DE"), ("de_DE", "fr_XX")],
    "mbart50": [("en_XX", "de_DE"), ("de_DE", "fr_XX")],
}


@pytest.mark.parametrize("kind", DIRECTIONS)
def test_each_request_of_a_batch_goes_its_own_way_and_gets_what_transformers_gives(
    kind: str, folders: dict[str, Path]
) -> None:
    # given requests of several directions and searches, for one batch
    ways: list[dict[str, Any]] = [{"num_beams": 1}, {"num_beams": 3, "n": 2}, {}]
    crowd = [
        (text, source, target, way)
        for (source, target), way in itertools.product(DIRECTIONS[kind], ways)
        for text in ENGLISH[:2]
    ]

    # when
    answers = translated(
        folders[kind],
        *(
            {"input": text, "source_language": source, "target_language": target} | way
            for text, source, target, way in crowd
        ),
    )

    # then
    for answer, (text, source, target, way) in zip(answers, crowd, strict=True):
        asked = None if kind == "marian" else target
        how = {"num_return_sequences" if name == "n" else name: it for name, it in way.items()}
        texts, num_tokens = expected(folders[kind], text, source, asked, **how)
        assert [choice["text"] for choice in answer["choices"]] == texts, (source, target, way)
        assert answer["usage"]["completion_tokens"] == num_tokens
