"""POST /tokenize and /detokenize."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Request

from invivo.server.answers import DetokenizedText, Tokens
from invivo.server.auth import Principal, needs
from invivo.server.documents import failures
from invivo.server.messages import template_messages, template_tools
from invivo.server.ownership import seen_by
from invivo.server.schemas import DetokenizeRequest, TokenizeRequest
from invivo.server.services import services_of

router = APIRouter(tags=["tokens"])


# Plain functions: FastAPI runs them in its thread pool, off the event loop.


@router.post("/tokenize", response_model=Tokens, responses=failures())
def tokenize(
    body: TokenizeRequest,
    request: Request,
    principal: Annotated[Principal, Depends(needs("generate", "score"))],
) -> Tokens:
    """Token ids of a text, or of a conversation as the model sees it."""
    services = services_of(request)
    services.adapter_of(body.model, seen_by(principal))
    if body.messages is None:
        assert body.text is not None
        text, special = body.text, body.special
    else:
        text = services.lm.apply_chat_template(
            template_messages(body.messages),
            tools=template_tools(body.tools),
            add_generation_prompt=body.add_generation_prompt,
        )
        special = False
    ids = services.lm.tokenize(text, special=special)
    return Tokens(tokens=ids, count=len(ids), max_model_len=services.info.max_model_len, text=text)


@router.post("/detokenize", response_model=DetokenizedText, responses=failures())
def detokenize(
    body: DetokenizeRequest,
    request: Request,
    principal: Annotated[Principal, Depends(needs("generate", "score"))],
) -> DetokenizedText:
    """Text of token ids, special tokens included."""
    services = services_of(request)
    services.adapter_of(body.model, seen_by(principal))
    return DetokenizedText(text=services.lm.detokenize(body.tokens))
