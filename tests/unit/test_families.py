"""The tables of models in docs/models.md are those of the catalogue; some families are tried."""

from __future__ import annotations

import re

import pytest

from app.engines.checkpoint import folder
from tests.families.catalogue import DECODERS, ENCODER_DECODERS, ENCODERS
from tests.families.table import NAMES, PAGE, Row, lines_of, name_of, summed_up
from tests.families.trial import try_decoder, try_encoder_decoder
from tests.pages import README

LEAST = {"decoders": 60, "encoder-decoders": 15, "encoders": 15, "broken folders": 10}
SAMPLE = [
    *("gpt_oss", "mixtral", "deepseek_v3", "ministral3", "gemma3_text", "phi3, longrope"),
    *("nemotron", "rwkv", "bloom"),
]
"""Attention sinks, experts, latent attention, scaling by position, windows and the like."""


@pytest.mark.parametrize("title", NAMES)
def test_the_table_of_models_is_that_of_the_catalogue(title: str) -> None:
    lines = lines_of(PAGE.read_text(), title)

    names = [name_of(line) for line in lines]
    assert names == NAMES[title]
    assert len(set(names)) == len(names) >= LEAST[title]
    assert not [line for line in lines if "| wrong" in line]


def test_the_tables_are_summed_up_on_their_page_and_in_the_readme() -> None:
    page = PAGE.read_text()

    assert page == summed_up(page)
    [(tried, equal)] = re.findall(
        r"^\| decoders, `inflight` \| (\d+) \| (\d+) ", page, re.MULTILINE
    )
    assert f"Of {tried} families of decoders {equal} run at full speed" in README.read_text()


@pytest.mark.parametrize("name", SAMPLE)
def test_a_family_of_decoders_runs_or_is_refused_as_the_table_says(name: str) -> None:
    [family] = [each for each in DECODERS if each.name == name]

    row = Row("decoders", name, try_decoder(family))

    assert row.line in lines_of(PAGE.read_text(), "decoders")


def test_an_encoder_decoder_runs_as_the_table_says() -> None:
    [family] = [each for each in ENCODER_DECODERS if each.name == "marian"]

    row = Row("encoder-decoders", family.name, try_encoder_decoder(family))

    assert row.line in lines_of(PAGE.read_text(), "encoder-decoders")


def test_the_families_of_the_catalogue_are_known_to_transformers() -> None:
    kinds = {family.kind for family in (*DECODERS, *ENCODER_DECODERS, *ENCODERS)}

    assert kinds <= folder._known_names()
