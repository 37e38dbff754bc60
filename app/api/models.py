"""/v1/models: what jobs may name."""

from __future__ import annotations

from fastapi import APIRouter

from app.api.caller import Who
from app.api.schemas import Model, ModelList
from app.api.services import Here

router = APIRouter(prefix="/v1/models", tags=["models"])


@router.get("", summary="List the models")
async def list_models(here: Here, _: Who) -> ModelList:
    """The configured models, whether or not a worker serves them right now."""
    return ModelList(
        data=[
            Model(
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
            for name, model in here.submitter.models.items()
        ]
    )
