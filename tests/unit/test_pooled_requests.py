"""Embeddings, classifications, rerank and score: what is asked, in tokens, and what is answered."""

from __future__ import annotations

import base64
import json
import re
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer

from app.broker.message import TASK_NAMES, TASKS
from app.cli.results import answers
from app.config.settings import ModelSettings
from app.engines.base import Generation
from app.engines.checkpoint.card import Card, load_card
from app.engines.text.tokenizer import FileTokenizer, StubTokenizer, load_tokenizer
from app.errors import ConfigError, ContextLengthExceeded, RequestError
from app.jobs import FinishReason, Kind
from app.requests import replies
from app.requests.bodies import BODIES, Request, Url, parse
from app.requests.prepare import Prepared, prepare
from app.requests.scoring import MAX_REPEATED
from app.store.tables import metadata
from tests import request_table
from tests.unit import tiny_encoders, tiny_models
from tests.unit.tiny_models import BOS, CONTEXT, EOS


def settings(kind: Kind = Kind.EMBED, **given: Any) -> ModelSettings:
    return ModelSettings(source="x", kind=kind, engine="encoder", **given)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_encoders.save_classifier(tmp_path_factory.mktemp("classifier"), labels=1)


def embedder(folder: Path, **files: dict[str, Any]) -> Path:
    """An embedder with these keys in files of sentence-transformers, `1_Pooling` for its config."""
    tiny_models.save_bert(folder)
    for name, content in files.items():
        path = folder / ("1_Pooling/config.json" if name == "pooling" else f"{name}.json")
        path.write_text(json.dumps(content))
    return folder


PROMPTS = {"prompts": {"query": "Find: ", "document": "Text: ", "plain": ""}}


def prepared(folder: Path, body: dict[str, Any], kind: Kind = Kind.EMBED, **more: Any) -> Prepared:
    model = settings(kind, **more)
    tokenizer = load_tokenizer(folder, model)
    return prepare(parse(body), tokenizer, model, load_card(folder, model))


def text_of(tokens: tuple[int, ...]) -> bytes:
    """A tiny model's token is a byte, by its place in the alphabet of ByteLevel."""
    alphabet = sorted(ByteLevel.alphabet())
    letters = "".join(alphabet[token] for token in tokens if token < 256)
    return letters.replace("Ġ", " ").encode()


# ── what sentence-transformers' files do to a text ──────────────────────────────────────────────


@pytest.mark.parametrize(
    ("default", "body", "text"),
    [
        (None, {}, b"water"),
        ("query", {}, b"Find: water"),
        (None, {"prompt_name": "document"}, b"Text: water"),
        ("query", {"prompt_name": "plain"}, b"water"),
        (None, {"input_type": "query"}, b"Find: water"),
        (None, {"input_type": "search_query"}, b"Find: water"),
        (None, {"input_type": "passage"}, b"Text: water"),
        ("query", {"input_type": "document"}, b"Text: water"),
    ],
)
def test_a_prompt_is_put_before_a_text_by_name_by_what_it_is_or_by_default(
    tmp_path: Path, default: str | None, body: dict[str, Any], text: bytes
) -> None:
    files = PROMPTS | {"default_prompt_name": default}
    folder = embedder(tmp_path, config_sentence_transformers=files)

    found = prepared(folder, {"input": "water"} | body)

    assert text_of(found.prompts[0]) == text


def test_blanks_and_capitals_are_as_sentence_transformers_has_them(tmp_path: Path) -> None:
    told = {"max_seq_length": 20, "do_lower_case": True}
    folder = embedder(tmp_path, sentence_bert_config=told, config_sentence_transformers=PROMPTS)

    found = prepared(folder, {"input": ["  Water \n", "Mill"], "input_type": "query"})

    assert list(map(text_of, found.prompts)) == [b"find:   water", b"find: mill"]
    with pytest.raises(ContextLengthExceeded, match="context is 20 tokens"):
        prepared(folder, {"input": "m" * 20})


def test_without_such_files_a_text_is_taken_as_it_is(tmp_path: Path) -> None:
    folder = tiny_models.save_bert(tmp_path, modules=False)

    assert text_of(prepared(folder, {"input": " Water "}).prompts[0]) == b" Water "


def test_a_prompt_that_is_not_pooled_is_skipped(tmp_path: Path) -> None:
    pooling = {"pooling_mode_mean_tokens": True, "include_prompt": False}
    folder = embedder(tmp_path, config_sentence_transformers=PROMPTS, pooling=pooling)

    asked = prepared(folder, {"input": "water", "prompt_name": "query"})

    assert asked.pooling.skip == len("<") + len("Find:")  # <bos> and the prompt, blank cut off
    assert prepared(folder, {"input": "water"}).pooling.skip == 0


@pytest.mark.parametrize(
    ("config", "options", "dimensions", "is_taken"),
    [
        ({}, {}, 32, True),
        ({}, {}, 8, False),
        ({"is_matryoshka": True}, {}, 8, True),
        ({"is_matryoshka": True}, {}, 33, False),
        ({"matryoshka_dimensions": [8, 16]}, {}, 16, True),
        ({"matryoshka_dimensions": [8, 16]}, {}, 12, False),
        ({}, {"matryoshka": True}, 5, True),
    ],
)
def test_a_vector_has_fewer_dimensions_only_where_the_model_allows_it(
    tmp_path: Path, config: dict[str, Any], options: Any, dimensions: int, is_taken: bool
) -> None:
    folder = embedder(tmp_path)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    body = {"input": "water", "dimensions": dimensions, "normalize": False}

    if is_taken:
        found = prepared(folder, body, options=options).pooling
        assert (found.dimensions, found.use_activation) == (dimensions, False)
    else:
        with pytest.raises(RequestError, match="cannot have") as refused:
            prepared(folder, body, options=options)
        assert refused.value.param == "dimensions"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt_name": "riddle"}, "prompt_name"),
        ({"prompt_name": "query", "input_type": "query"}, "input_type"),
        ({"input_type": "riddle"}, "input_type"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": 1}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": CONTEXT + 1}, "truncate_prompt_tokens"),
        ({"dimensions": 0}, "dimensions"),
    ],
)
def test_what_cannot_be_done_to_an_embedding_is_refused_by_its_field(
    tmp_path: Path, body: dict[str, Any], param: str
) -> None:
    folder = embedder(tmp_path, config_sentence_transformers=PROMPTS)

    with pytest.raises(RequestError) as refused:
        prepared(folder, {"input": "water"} | body)

    assert refused.value.param == param


@pytest.mark.parametrize("labels", [{"0": "a", "2": "b"}, {"0": "a", "1": "a"}])
def test_labels_that_do_not_name_each_class_once_are_refused(
    tmp_path: Path, labels: dict[str, str]
) -> None:
    folder = tiny_encoders.save_classifier(tmp_path)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"id2label": labels}))

    with pytest.raises(ConfigError, match="id2label"):
        load_card(folder, settings(Kind.CLASSIFY))


# ── pairs, and what is cut ──────────────────────────────────────────────────────────────────────

LETTERS = st.text("abc ", max_size=40)


@given(first=LETTERS, second=st.none() | LETTERS, most=st.integers(5, 90), side=st.booleans())
def test_texts_and_pairs_are_cut_as_transformers_cuts_them(
    classifier: Path, first: str, second: str | None, most: int, side: bool
) -> None:
    tokenizer = load_tokenizer(classifier, settings(Kind.RERANK))
    assert isinstance(tokenizer, FileTokenizer)
    tokenizer._cut_side = "left" if side else "right"
    reference = AutoTokenizer.from_pretrained(classifier, truncation_side=tokenizer._cut_side)

    found = tokenizer.encode(first, second, max_tokens=most)

    expected = reference(
        [first],
        None if second is None else [second],
        truncation="longest_first",
        max_length=most,
        return_token_type_ids=True,
    )
    assert [list(found.ids)] == expected["input_ids"]
    types = found.type_ids or (0,) * len(found.ids)
    assert [list(types)] == expected["token_type_ids"]


def test_a_query_and_each_document_are_one_prompt_of_two_types(classifier: Path) -> None:
    found = prepared(classifier, {"query": " ab", "documents": ["c", {"text": "dd "}]}, Kind.RERANK)

    sizes = [(types.count(0), types.count(1)) for types in found.type_ids]
    assert sizes == [(4, 2), (4, 3)]  # <bos> a b <eos>; c <eos>, d d <eos>
    assert [(ids[0], ids[3], ids[-1]) for ids in found.prompts] == [(BOS, EOS, EOS)] * 2
    assert found.max_tokens == 0


@pytest.mark.parametrize(
    ("body", "length"),
    [
        ({"truncate_prompt_tokens": -1}, CONTEXT),
        ({"truncate_prompt_tokens": 20}, 20),
        ({"max_tokens_per_doc": 7}, 3 + 2 + 7),
        ({"max_tokens_per_doc": 30, "truncate_prompt_tokens": 25}, 25),
    ],
)
def test_long_documents_are_cut_only_when_that_is_asked_for(
    classifier: Path, body: dict[str, Any], length: int
) -> None:
    asked = {"query": "ab", "documents": ["c" * 1000]}

    found = prepared(classifier, asked | body, Kind.RERANK)

    assert len(found.prompts[0]) == length
    with pytest.raises(ContextLengthExceeded):
        prepared(classifier, asked, Kind.RERANK)


def test_pairs_may_be_classified_too(classifier: Path) -> None:
    request = parse({"input": [["ab", "c"], ["d", "e"]]}, "/v1/classify")
    model = settings(Kind.CLASSIFY)

    found = prepare(request, load_tokenizer(classifier, model), model)

    assert [types.count(1) for types in found.type_ids] == [2, 2]


# ── which call it is ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("body", "url", "call"),
    [
        ({"input": "x"}, None, Url.EMBEDDINGS),
        ({"input": "x", "model": "sorter"}, None, Url.CLASSIFY),
        ({"input": "x", "model": "embedder"}, None, Url.EMBEDDINGS),
        ({"input": "x"}, "/classify", Url.CLASSIFY),
        ({"query": "x", "documents": ["y"]}, None, Url.RERANK),
        ({"query": "x", "documents": ["y"]}, "/v2/rerank", Url.RERANK),
        ({"text_1": "x", "text_2": "y"}, None, Url.SCORE),
        ({"text_1": "x", "text_2": "y"}, "/score", Url.SCORE),
    ],
)
def test_the_call_follows_from_fields_and_model_and_has_the_paths_of_other_servers(
    body: dict[str, Any], url: str | None, call: Url
) -> None:
    kinds = {"sorter": Kind.CLASSIFY, "embedder": Kind.EMBED}

    request = parse(body, url, kind_of=kinds.get)

    assert request.url is call
    assert parse(request.raw, request.url) == request  # as it is read from its row


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"query": "x"}, "documents"),
        ({"query": "x", "documents": []}, "documents"),
        ({"query": "x", "documents": [{"title": "y"}]}, "documents.0"),
        ({"query": "x", "documents": ["y"], "top_n": -1}, "top_n"),
        ({"query": "x", "documents": ["y"], "rank_fields": ["z"]}, "rank_fields"),
        ({"query": "x" * (MAX_REPEATED // 2), "documents": ["y"] * 3}, "query"),
        ({"text_1": ["x", "y"], "text_2": "z"}, "text_1"),
        ({"text_1": "x" * (MAX_REPEATED // 2), "text_2": ["y"] * 3}, "text_1"),
        ({"text_1": "x", "query": "y"}, "text_1"),
    ],
)
def test_a_wrong_rerank_or_score_is_refused_by_its_field(body: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as refused:
        parse(body)

    assert refused.value.param == param


def test_every_kind_has_a_task_a_call_and_a_place_in_each_table() -> None:
    assert set(TASK_NAMES) == set(TASKS.values()) == {body.KIND for body in BODIES.values()}
    assert set(Kind) == set(TASK_NAMES)
    for table in ("open_jobs", "results", "batches"):
        [check] = [
            str(each.sqltext)  # type: ignore[attr-defined]
            for each in metadata.tables[table].constraints
            if str(getattr(each, "sqltext", "")).startswith("kind = ")
        ]
        listed = check.partition("{")[2].partition("}")[0]
        assert set(listed.split(",")) == set(Kind)


# ── answers ─────────────────────────────────────────────────────────────────────────────────────


def answer(request: Request, *values: list[float], labels: tuple[str, ...] = ()) -> dict[str, Any]:
    field = "embedding" if request.kind is Kind.EMBED else "scores"
    made = [
        Generation(place, FinishReason.STOP, input_tokens=3, **{field: value})  # type: ignore[arg-type]
        for place, value in enumerate(values)
    ]
    return replies.body(
        request,
        made,
        job_id="7",
        model="m",
        created=9,
        tokenizer=StubTokenizer(settings()),
        prompts=[],
        labels=labels,
    )


def test_a_classification_has_the_likeliest_label_and_all_probabilities_by_label() -> None:
    request = parse({"input": ["x", "y"]}, "/v1/classify")

    body = answer(request, [0.25, 0.75], [0.5, 0.5], labels=("bad", "good"))

    assert body == {
        "id": "classify-7",
        "object": "list",
        "created": 9,
        "model": "m",
        "data": [
            {
                "index": 0,
                "object": "classification",
                "label": "good",
                "probs": [0.25, 0.75],
                "num_classes": 2,
                "scores": {"bad": 0.25, "good": 0.75},
            },
            {
                "index": 1,
                "object": "classification",
                "label": "bad",
                "probs": [0.5, 0.5],
                "num_classes": 2,
                "scores": {"bad": 0.5, "good": 0.5},
            },
        ],
        "usage": {"prompt_tokens": 6, "total_tokens": 6},
    }


def test_logits_are_not_called_probabilities() -> None:
    request = parse({"input": "x", "use_activation": False}, "/v1/classify")

    [item] = answer(request, [-3.0, 2.0])["data"]

    assert (item["logits"], item["label"]) == ([-3.0, 2.0], "LABEL_1")
    assert "probs" not in item


def test_documents_come_best_first_and_only_as_many_as_asked_for() -> None:
    documents = ["a", {"text": "b"}, "c"]
    request = parse({"query": "x", "documents": documents, "top_n": 2, "return_documents": True})

    body = answer(request, [0.1], [0.9], [0.9])

    assert body["id"] == "rerank-7"
    assert body["results"] == [
        {"index": 1, "relevance_score": 0.9, "document": {"text": "b"}},
        {"index": 2, "relevance_score": 0.9, "document": {"text": "c"}},
    ]
    assert body["usage"] == {"prompt_tokens": 9, "total_tokens": 9}


@pytest.mark.parametrize("top_n", [None, 0, 3, 7])
def test_without_a_top_n_all_documents_come_and_no_text_comes_back(top_n: int | None) -> None:
    request = parse({"query": "x", "documents": ["a", "b", "c"], "top_n": top_n})

    results = answer(request, [0.1], [0.2], [0.3])["results"]

    assert results == [
        {"index": index, "relevance_score": score}
        for index, score in [(2, 0.3), (1, 0.2), (0, 0.1)]
    ]


def test_scores_come_in_the_order_of_their_texts() -> None:
    body = answer(parse({"text_1": ["x", "y"], "text_2": ["a", "b"]}), [0.1], [0.9])

    assert (body["id"], body["object"], body["created"]) == ("score-7", "list", 9)
    assert body["data"] == [
        {"index": 0, "object": "score", "score": 0.1},
        {"index": 1, "object": "score", "score": 0.9},
    ]


def test_a_vector_in_base64_is_little_endian_float32() -> None:
    request = parse({"input": "x", "encoding_format": "base64"})

    [item] = answer(request, [0.5, -2.0])["data"]

    assert struct.unpack("<2f", base64.b64decode(item["embedding"])) == (0.5, -2.0)


def test_a_card_of_a_model_that_embeds_nothing_says_nothing() -> None:
    assert Card().prompt(None, "query") == ""


def test_a_label_that_could_not_be_stored_keeps_no_answer_from_it(tmp_path: Path) -> None:
    folder = tiny_encoders.save_classifier(tmp_path)
    path = folder / "config.json"
    labels = {"id2label": {"0": "a\0", "1": "\ud800b", "2": "c"}}
    path.write_text(json.dumps(json.loads(path.read_text()) | labels))

    card = load_card(folder, settings(Kind.CLASSIFY))

    assert card.labels == ("a\ufffd", "?b", "c")


def test_the_requests_on_the_page_would_be_accepted() -> None:
    blocks = re.findall(r"```json\n(.*?)```", request_table.PAGE.read_text(), re.DOTALL)
    asked = [each for each in map(json.loads, blocks) if "body" in each]

    calls = [parse(each["body"], each.get("url")).url for each in asked]

    assert {Url.CLASSIFY, Url.RERANK} <= set(calls)


@pytest.mark.parametrize(
    ("call", "body", "values", "told"),
    [
        ("/v1/embeddings", {"input": "x"}, [[0.5]], [[0.5]]),
        ("/v1/classify", {"input": "x"}, [[0.5, 0.5]], [{"LABEL_0": 0.5, "LABEL_1": 0.5}]),
        (
            "/v1/rerank",
            {"query": "x", "documents": ["y"]},
            [[0.5]],
            [{"index": 0, "relevance_score": 0.5}],
        ),
        ("/v1/score", {"text_1": "x", "text_2": "y"}, [[0.5]], [0.5]),
    ],
)
def test_the_command_tells_what_each_answer_says(
    call: str, body: dict[str, Any], values: list[list[float]], told: list[Any]
) -> None:
    assert list(answers(answer(parse(body, call), *values))) == told
