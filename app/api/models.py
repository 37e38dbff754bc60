"""/v1/models: what calls may name, in our own shape, which is OpenAI's and more, or Anthropic's."""

from __future__ import annotations

from datetime import UTC, datetime
from http import HTTPStatus
from itertools import islice
from typing import Annotated, Final

from fastapi import APIRouter, Path, Query, Request, Response

from app.api.answers import JSON
from app.api.caller import Who
from app.api.envelopes import Door, door_of
from app.api.problems import documented
from app.api.schemas import AnthropicModel, AnthropicModelList, Model, ModelList
from app.api.services import Here, Services
from app.engines.catalog import CatalogModel
from app.errors import ModelNotFound
from app.jobs import Kind

router = APIRouter(prefix="/v1/models", tags=["models"])

_UNKNOWN: Final = datetime(1970, 1, 1, tzinfo=UTC)
"""When a model was made, as Anthropic says it of those of which that is not known."""


@router.get(
    "",
    summary="List the models",
    response_model=ModelList | AnthropicModelList,
    response_description="The models; in Anthropic's shape where its clients ask.",
)
async def list_models(
    request: Request,
    here: Here,
    _: Who,
    after_id: Annotated[
        str | None, Query(description="Of Anthropic's clients: those behind this model.")
    ] = None,
    before_id: Annotated[
        str | None, Query(description="Of Anthropic's clients: those before this model.")
    ] = None,
    limit: Annotated[
        int, Query(ge=1, le=1000, description="Of Anthropic's clients: most models of a page.")
    ] = 1000,
) -> Response:
    """The configured models, whether or not a worker serves them right now.

    Whoever sends the header `anthropic-version` gets those that answer messages, page by page.
    """
    if _door(request) is Door.ANTHROPIC:
        told: ModelList | AnthropicModelList = _page(here, after_id, before_id, limit)
    else:
        models = here.submitter.models.items()
        told = ModelList(data=[_model(name, model) for name, model in models])
    return Response(told.model_dump_json(), media_type=JSON)


@router.get(
    "/{model_id}",
    summary="Tell of a model",
    response_model=Model | AnthropicModel,
    response_description="The model; in Anthropic's shape where its clients ask.",
    responses=documented(HTTPStatus.NOT_FOUND, door=Door.OPENAI),
)
async def get_model(
    request: Request,
    here: Here,
    _: Who,
    model_id: Annotated[
        str, Path(description="The model's name.", examples=["smollm2-135m-instruct"])
    ],
) -> Response:
    """One configured model."""
    model = here.submitter.models.get(model_id)
    if model is None:
        raise ModelNotFound("There is no such model; GET /v1/models lists them.", param="model")
    is_anthropic = _door(request) is Door.ANTHROPIC
    told = (_anthropic if is_anthropic else _model)(model_id, model)
    return Response(told.model_dump_json(), media_type=JSON)


def _door(request: Request) -> Door:
    return door_of(request.url.path, request.headers)


def _model(name: str, model: CatalogModel) -> Model:
    return Model(
        id=name,
        kind=model.settings.kind,
        default=model.settings.default,
        labels=list(model.card.labels),
        prompts=list(model.card.prompts),
        languages=model.tokenizer.languages.names,
        context_tokens=model.tokenizer.context_tokens,
        max_output_tokens=model.settings.max_output_tokens,
        max_batch_size=model.settings.max_batch_size,
        max_batch_tokens=model.settings.max_batch_tokens,
    )


def _anthropic(name: str, model: CatalogModel) -> AnthropicModel:
    return AnthropicModel(
        id=name,
        display_name=name,
        created_at=_UNKNOWN,
        max_input_tokens=model.tokenizer.context_tokens,
        max_tokens=model.settings.max_output_tokens,
    )


def _page(
    here: Services, after_id: str | None, before_id: str | None, limit: int
) -> AnthropicModelList:
    """A name that there is not stands for the end that it would be asked from."""
    names = [
        name
        for name, model in here.submitter.models.items()
        if model.settings.kind is Kind.GENERATE
    ]
    if before_id is not None:
        names = names[: names.index(before_id)] if before_id in names else []
        page = names[-limit:]
    else:
        start = names.index(after_id) + 1 if after_id in names else 0
        names = names[start:]
        page = list(islice(names, limit))
    return AnthropicModelList(
        data=[_anthropic(name, here.submitter.models[name]) for name in page],
        has_more=len(page) < len(names),
        first_id=page[0] if page else None,
        last_id=page[-1] if page else None,
    )
