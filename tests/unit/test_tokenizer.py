"""Text to tokens and every limit in tokens, without loading torch."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken
from tokenizers import Tokenizer as TokenizerFile
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import BertPreTokenizer
from transformers import AutoTokenizer

from app.config.settings import ModelSettings
from app.engines.text.tokenizer import StubTokenizer, Tokenizer, load_tokenizer
from app.errors import ConfigError, ContextLengthExceeded, RequestError
from app.jobs import Kind
from app.requests.bodies import parse
from app.requests.prepare import encode, prepare
from tests.unit import tiny_models, tiny_tokenizers
from tests.unit.tiny_models import BOS, CONTEXT, EOS, VOCAB
from tests.waiting import eventually

TEXTS = ["water wheel", "naïve 漢字 🙂", "  two  spaces\n\n", "<eos> inside"]


def settings(**given: Any) -> ModelSettings:
    return ModelSettings(**{"source": "x", "kind": Kind.GENERATE, "engine": "generate"} | given)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_llama(tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder, settings())


def copy_of(folder: Path, into: Path, **changes: dict[str, Any]) -> Path:
    """The same model with some keys of its JSON files changed: config={...}."""
    into.mkdir(exist_ok=True)
    for file in folder.iterdir():
        (into / file.name).write_bytes(file.read_bytes())
    for name, keys in changes.items():
        file = into / f"{name}.json"
        content = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(content | keys))
    return into


@pytest.mark.parametrize("text", TEXTS)
def test_texts_encode_and_decode_as_in_transformers(
    folder: Path, tokenizer: Tokenizer, text: str
) -> None:
    reference = AutoTokenizer.from_pretrained(folder)

    found = tokenizer.encode_text(text, parse_special=True)

    assert list(found) == reference(text)["input_ids"]
    assert found[0] == BOS
    assert tokenizer.decode(found) == reference.decode(found, skip_special_tokens=True)


def test_a_conversation_is_rendered_as_in_transformers(folder: Path, tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "hello <b>"}, {"role": "assistant", "content": "ok"}]
    reference = AutoTokenizer.from_pretrained(folder)

    [found] = encode(parse({"messages": messages}), tokenizer)

    expected = reference.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert list(found) == expected
    assert found.count(BOS) == 2


def test_a_template_may_use_what_transformers_offers(folder: Path, tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
        "{% generation %}{{ m | tojson }}{% endgeneration %}{% endfor %}"
        "{{ strftime_now('%Y') | length }}{% if add_generation_prompt %}>{% endif %}"
    )
    changed = copy_of(folder, tmp_path, tokenizer_config={"chat_template": template})
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)

    tokenizer = load_tokenizer(changed, settings())
    [found] = encode(parse({"messages": [{"role": "user", "content": "<é>"}]}), tokenizer)

    assert tokenizer.decode(found) == '{"role": "user", "content": "<é>"}4>'


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refuses these messages: roles must"),
        ("{{ messages[7].content.secret }}", r"failed on these messages \(UndefinedError\)"),
        ("{{ messages.__class__.__mro__ }}", r"failed on these messages \(SecurityError\)"),
    ],
)
def test_a_template_that_fails_is_the_requests_fault_and_quotes_nothing(
    folder: Path, tmp_path: Path, template: str, reason: str
) -> None:
    changed = copy_of(folder, tmp_path, tokenizer_config={"chat_template": template})

    tokenizer = load_tokenizer(changed, settings())
    with pytest.raises(RequestError, match=reason) as caught:
        encode(parse({"messages": [{"role": "user", "content": "quiet"}]}), tokenizer)

    assert caught.value.param == "messages"
    assert "quiet" not in caught.value.message


def test_a_model_without_a_template_takes_prompts_only(tmp_path: Path) -> None:
    folder = tiny_models.save_t5(tmp_path / "t5")
    tokenizer = load_tokenizer(folder, settings())

    [prompt] = encode(parse({"prompt": "a"}), tokenizer)

    assert (tokenizer.decode(prompt), prompt[-1]) == ("a", EOS)
    with pytest.raises(RequestError, match="no chat template; send a prompt"):
        encode(parse({"messages": [{"role": "user", "content": "a"}]}), tokenizer)


def test_several_prompts_keep_their_order(tokenizer: Tokenizer) -> None:
    prepared = prepare(
        parse({"prompt": ["a", "bb"], "n": 2, "max_tokens": 5}), tokenizer, settings()
    )

    assert [len(prompt) for prompt in prepared.prompts] == [2, 3]
    assert (prepared.num_input_tokens, prepared.max_tokens) == (5, 5)


@pytest.mark.parametrize(
    ("body", "param", "reason"),
    [
        ({"prompt": [5, VOCAB]}, "prompt", "token id is out of range"),
        ({"prompt": [[5], [VOCAB]]}, "prompt.1", "token id is out of range"),
        ({"prompt": "a", "n": 20}, "n", "20 sequences"),
        ({"prompt": ["a"] * 20}, "prompt", "20 sequences"),
        ({"prompt": "a", "max_tokens": 61}, "max_tokens", "at most 60 tokens"),
        (
            {"messages": [{"role": "user", "content": "a"}], "max_completion_tokens": 61},
            "max_completion_tokens",
            "at most 60 tokens",
        ),
        ({"prompt": "a" * 40, "n": 8, "max_tokens": 30}, "prompt", "limit of 512 tokens at once"),
    ],
)
def test_what_is_beyond_a_limit_is_refused_with_its_field(
    tokenizer: Tokenizer, body: dict[str, Any], param: str, reason: str
) -> None:
    limits = settings(max_output_tokens=60, max_batch_tokens=512)

    with pytest.raises(RequestError, match=reason) as caught:
        prepare(parse(body), tokenizer, limits)

    assert caught.value.param == param


@pytest.mark.parametrize(
    "body", [{"prompt": "a" * CONTEXT}, {"prompt": "a" * 50, "max_tokens": CONTEXT - 50}]
)
def test_prompt_and_answer_must_fit_the_context(tokenizer: Tokenizer, body: dict[str, Any]) -> None:
    with pytest.raises(ContextLengthExceeded) as caught:
        prepare(parse(body), tokenizer, settings())

    assert caught.value.param == "prompt"
    assert str(CONTEXT) in caught.value.message


class Untouched(StubTokenizer):
    """Fails if a text is given to it."""

    def encode_text(self, text: str, *, parse_special: bool = False) -> tuple[int, ...]:
        raise AssertionError("It is not to be tokenised.")


LONG = "long " * 20_000


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": LONG}, "prompt"),
        ({"prompt": [LONG, "a"]}, "prompt.0"),
        ({"input": LONG}, "input"),
        ({"input": [LONG, LONG]}, "input.0"),
        ({"messages": [{"role": "user", "content": LONG}]}, "messages"),
        ({"messages": [{"role": "user", "content": "long" * 500}] * 40}, "messages"),
    ],
)
def test_a_prompt_that_is_too_long_whatever_it_says_is_refused_before_it_is_tokenised(
    body: dict[str, Any], param: str
) -> None:
    with pytest.raises(ContextLengthExceeded, match="takes at most 65536") as caught:
        prepare(parse(body), Untouched(settings()), settings())

    assert caught.value.param == param


def test_of_many_prompts_none_is_tokenised_after_one_that_does_not_fit() -> None:
    class Counting(StubTokenizer):
        num_texts = 0

        def encode_text(self, text: str, *, parse_special: bool = False) -> tuple[int, ...]:
            self.num_texts += 1
            return super().encode_text(text)

    tokenizer = Counting(settings(context_tokens=CONTEXT))
    with pytest.raises(ContextLengthExceeded) as caught:
        prepare(parse({"prompt": ["a", "b" * CONTEXT, *"cdef"]}), tokenizer, settings())

    assert (caught.value.param, tokenizer.num_texts) == ("prompt.1", 2)


@given(
    st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(" \n<e漢🙂"), max_size=60)
)
def test_no_text_has_fewer_tokens_than_its_length_says(
    folder: Path, tokenizer: Tokenizer, text: str
) -> None:
    # given tokenizers of bytes, of which one has long tokens
    merged = merging(folder)

    # then no text that would fit is refused by its length
    for each in (tokenizer, merged, StubTokenizer(settings())):
        assert each.length(text) <= each.longest_token * len(each.encode_text(text))
    assert (tokenizer.longest_token, merged.longest_token) == (
        len("<eos>"),
        len("naïve 漢字".encode()),
    )


@functools.cache
def merging(folder: Path) -> Tokenizer:
    """The same, with a token of several words."""
    into = copy_of(folder, folder.with_name("merging"))
    file = TokenizerFile.from_file(str(into / "tokenizer.json"))
    file.add_tokens([AddedToken("naïve 漢字", normalized=False)])
    file.save(str(into / "tokenizer.json"))
    return load_tokenizer(into, settings())


def test_characters_count_where_a_vocabulary_is_made_of_them(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": CONTEXT}))
    vocab = {word: place for place, word in enumerate(["[UNK]", "wheel", "müller"])}
    file = TokenizerFile(WordPiece(vocab, unk_token="[UNK]"))
    file.pre_tokenizer = BertPreTokenizer()
    file.save(str(tmp_path / "tokenizer.json"))

    tokenizer = load_tokenizer(tmp_path, settings())

    # a word that is not known and whitespace are of any length, so a short text is never refused
    text = "müller" + " " * 50_000 + "x" * 9_000
    assert (tokenizer.longest_token, tokenizer.length(text)) == (6, 59_006)
    assert len(prepare(parse({"input": text}), tokenizer, settings()).prompts[0]) == 2
    with pytest.raises(ContextLengthExceeded, match="65537 characters"):
        prepare(parse({"input": "ü" * 65_537}), tokenizer, settings())


def test_other_threads_go_on_while_a_long_text_is_tokenised(tokenizer: Tokenizer) -> None:
    # given a thread that does something again and again
    turns, is_over = 0, threading.Event()

    def turn() -> None:
        nonlocal turns
        while not is_over.wait(0.0001):
            turns += 1

    thread = threading.Thread(target=turn)
    thread.start()
    eventually(lambda: turns > 0)

    # when a text is tokenised that takes long
    text = "the water wheel turns " * 50_000
    before = turns
    tokenizer.encode_text(text)
    meanwhile = turns - before
    is_over.set()
    thread.join()

    # then it had more turns than a switch of threads before and one after
    assert meanwhile > 10


def test_the_default_output_is_cut_to_the_room_that_is_left(tokenizer: Tokenizer) -> None:
    prompt = {"prompt": "a" * 50}  # and <bos>

    assert prepare(parse(prompt), tokenizer, settings()).max_tokens == CONTEXT - 51
    assert prepare(parse(prompt), tokenizer, settings(default_max_tokens=9)).max_tokens == 9
    assert prepare(parse(prompt), tokenizer, settings(max_batch_tokens=80)).max_tokens == 29
    assert prepare(parse(prompt), tokenizer, settings(max_output_tokens=7)).max_tokens == 7


def test_the_output_of_an_encoder_decoder_has_a_context_of_its_own(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_models.save_t5(tmp_path / "t5"), settings())

    request = parse({"prompt": "a" * (CONTEXT - 1), "max_tokens": CONTEXT})

    assert prepare(request, tokenizer, settings()).max_tokens == CONTEXT
    with pytest.raises(ContextLengthExceeded):
        prepare(parse({"prompt": "a" * CONTEXT}), tokenizer, settings())


def test_an_embedding_may_fill_the_whole_context(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_models.save_bert(tmp_path / "bert"), settings())

    prepared = prepare(parse({"input": "a" * (CONTEXT - 1)}), tokenizer, settings())

    assert (prepared.num_input_tokens, prepared.max_tokens) == (CONTEXT, 0)
    with pytest.raises(ContextLengthExceeded):
        prepare(parse({"input": "a" * CONTEXT}), tokenizer, settings())


def test_the_context_is_the_smallest_that_the_files_name(folder: Path, tmp_path: Path) -> None:
    def context(name: str, kind: Kind = Kind.GENERATE, **changes: dict[str, Any]) -> int:
        changed = copy_of(folder, tmp_path / name, **changes)
        return load_tokenizer(changed, settings(kind=kind)).context_tokens

    assert context("as-it-is") == CONTEXT
    assert context("tokenizer", tokenizer_config={"model_max_length": 40}) == 40
    assert context("unlimited", tokenizer_config={"model_max_length": 10**30}) == CONTEXT
    embeds = {"sentence_bert_config": {"max_seq_length": 30}}
    assert context("sentence", Kind.EMBED, **embeds) == 30
    assert load_tokenizer(folder, settings(context_tokens=50)).context_tokens == 50
    with pytest.raises(ConfigError, match=f"context is {CONTEXT} tokens"):
        load_tokenizer(folder, settings(context_tokens=CONTEXT + 1))


def test_an_output_ends_where_generation_settings_or_tokenizer_say(
    folder: Path, tmp_path: Path
) -> None:
    def ends(name: str, **changes: dict[str, Any]) -> set[int]:
        changed = copy_of(folder, tmp_path / name, **changes)
        return set(load_tokenizer(changed, settings()).eos_token_ids)

    assert ends("as-it-is") == {EOS}
    assert ends("several", generation_config={"eos_token_id": [3, 4]}) == {3, 4, EOS}
    unset: dict[str, Any] = {"eos_token_id": None}
    assert ends("config", generation_config=unset, config={"eos_token_id": 5}) == {5, EOS}
    assert ends("tokenizer", generation_config=unset, config=unset) == {EOS}
    nothing = {"eos_token": None}
    assert ends("none", generation_config=unset, config=unset, tokenizer_config=nothing) == set()


@pytest.mark.parametrize(
    ("template", "end"),
    [
        ("{% for m in messages %}<|turn|>{{ m.content }}<|end|>\n{% endfor %}", "<|end|>"),
        ("{% for m in messages %}[{{ m.content | trim }}] <|end|>{% endfor %}", None),
        ("{% for m in messages %}{{ m.content }} <|end|>{% endfor %}<|turn|>", "<|end|>"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", None),
        ("{{ raise_exception('no') if messages | length > 1 }}{{ messages[0].content }}", None),
        # how gpt-oss tells the end of a message from the end of an answer
        (
            "{% for m in messages %}{{ m.content }}"
            "{{ '<|end|>' if loop.last and not add_generation_prompt else '<|turn|>' }}"
            "{% endfor %}",
            "<|end|>",
        ),
    ],
)
def test_an_output_ends_where_the_chat_template_ends_an_answer(
    folder: Path, tmp_path: Path, template: str, end: str | None
) -> None:
    changed = copy_of(folder, tmp_path, tokenizer_config={"chat_template": template})
    file = TokenizerFile.from_file(str(changed / "tokenizer.json"))
    file.add_tokens([AddedToken("<|turn|>", normalized=False), AddedToken("<|end|>")])
    file.save(str(changed / "tokenizer.json"))

    tokenizer = load_tokenizer(changed, settings())

    added = file.token_to_id("<|end|>")
    assert tokenizer.eos_token_ids == ({EOS} if end is None else {EOS, added})
    # and it is in no text, though the file does not call it special
    assert tokenizer.token_bytes(added, 9) == (b"<|end|>" if end is None else b"")


@pytest.mark.parametrize(
    "given",
    [
        {"add_bos_token": False, "add_eos_token": True},
        {"added_tokens_decoder": {str(VOCAB - 1): {"content": "<|end|>", "special": True}}},
        {
            "added_tokens_decoder": {
                str(VOCAB): {"content": "<|b|>", "special": False, "lstrip": True},
                str(VOCAB - 1): {"content": "<|end|>", "special": True, "normalized": False},
            }
        },
    ],
)
def test_what_the_tokenizers_settings_add_is_added_as_in_transformers(
    folder: Path, tmp_path: Path, given: dict[str, Any]
) -> None:
    changed = copy_of(folder, tmp_path, tokenizer_config=given)
    reference = AutoTokenizer.from_pretrained(changed)

    tokenizer = load_tokenizer(changed, settings())

    for text in ("a mill", "a<|end|> <|b|>mill<eos>"):
        found = tokenizer.encode_text(text, parse_special=True)
        assert list(found) == reference(text)["input_ids"]
        assert tokenizer.decode(found) == reference.decode(found, skip_special_tokens=True)


def test_the_end_may_be_named_in_an_older_file_and_be_an_ordinary_word_of_the_vocabulary(
    tmp_path: Path,
) -> None:
    # given a file that has "</s>" as a token, and does not say that it is special
    file = tiny_tokenizers.llama()
    state = json.loads(file.to_str()) | {"added_tokens": []}
    folder = tiny_tokenizers.save(TokenizerFile.from_str(json.dumps(state)), tmp_path)
    (folder / "tokenizer_config.json").unlink()
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "</s>"}))

    tokenizer = load_tokenizer(folder, settings())

    assert tokenizer.eos_token_ids == {tiny_tokenizers.EOS}
    assert tokenizer.encode_text("</s>", parse_special=True) == (tiny_tokenizers.EOS,)
    assert tiny_tokenizers.EOS not in tokenizer.encode_text("</s>")


def test_a_letter_that_some_pad_with_is_text(folder: Path, tmp_path: Path) -> None:
    named = {"pad_token": "!", "unk_token": "<unk>"}
    changed = copy_of(folder, tmp_path, tokenizer_config=named)

    tokenizer = load_tokenizer(changed, settings())

    [exclamation] = tokenizer.encode_within("!")
    assert tokenizer.token_bytes(exclamation, 9) == b"!"


def test_a_limit_left_in_the_tokenizer_file_does_not_cut_texts(
    folder: Path, tmp_path: Path
) -> None:
    cut = {"max_length": 3, "direction": "Right", "stride": 0, "strategy": "LongestFirst"}
    changed = copy_of(folder, tmp_path, tokenizer={"truncation": cut})

    assert len(load_tokenizer(changed, settings()).encode_text("abcdef")) == 7


def test_the_stub_counts_bytes() -> None:
    tokenizer = load_tokenizer(
        Path("nowhere"), ModelSettings(source="stub", kind=Kind.GENERATE, engine="stub")
    )

    assert isinstance(tokenizer, StubTokenizer)
    assert tokenizer.decode(tokenizer.encode_text("héllo")) == "héllo"
    prepared = prepare(parse({"prompt": "héllo"}), tokenizer, settings())
    assert prepared.num_input_tokens == 6


def test_counting_tokens_loads_neither_torch_nor_transformers(folder: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from app.config.settings import ModelSettings
from app.engines import registry
from app.engines.catalog import load_catalog
from app.engines.text.tokenizer import load_tokenizer
settings = ModelSettings(source="x", kind="generate", engine="generate")
load_tokenizer(Path({str(folder)!r}), settings).encode_text("a")
print(sorted({{"torch", "transformers"}} & sys.modules.keys()))
"""

    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)

    assert done.stdout.strip() == "[]"
