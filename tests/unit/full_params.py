"""Sampling parameters in which every field says something."""

from __future__ import annotations

from app.jobs import Grammar, SamplingParams

FULL = SamplingParams(
    max_tokens=9,
    temperature=0.7,
    top_p=0.8,
    top_k=3,
    min_p=0.1,
    presence_penalty=0.2,
    frequency_penalty=0.3,
    repetition_penalty=1.1,
    logit_bias=((4, -1.5),),
    bad_words=((7, 8),),
    min_tokens=2,
    stop=("x",),
    stop_token_ids=(6,),
    seed=5,
    logprobs=1,
    prompt_logprobs=1,
    ignore_eos=True,
    grammar=Grammar("json_schema", '{"type": "object"}'),
    num_beams=4,
    length_penalty=2.0,
    early_stopping=True,
    beam=1,
    decoder_start_token_id=3,
    forced_bos_token_id=4,
    unset=frozenset({"temperature"}),
)
