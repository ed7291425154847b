"""Requests: what each route accepts. Unknown fields are refused, every size is bounded.

Shapes are OpenAI's (https://platform.openai.com/docs/api-reference); fields beyond them are marked
"extension" in their descriptions. Ranges that depend on the model are checked by the engine.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

MAX_TEXT = 1 << 22  # characters; the body limit is usually lower
MAX_DEPTH = 64  # nesting of JSON schemas and tools
ADAPTER_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
BLOB_ID = r"^sha256:[0-9a-f]{64}$"  # and a program's hash
MAX_TOKEN_ID = 2**31 - 1


class Strict(BaseModel):
    """No unknown fields, no silent conversions, no infinities."""

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=()
    )


def _plain_json(value: dict[str, Any]) -> dict[str, Any]:
    """Free-form JSON must be finite, valid Unicode and not nested beyond reason."""
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        level = [child for item in level for child in _children(item)]
        if not level:
            break
    else:
        raise ValueError(f"nested more than {MAX_DEPTH} levels deep")
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except ValueError:
        raise ValueError("holds an infinite number or text that is not Unicode") from None
    return value


def _children(item: Any) -> list[Any]:
    if isinstance(item, dict):
        return list(item.values())
    return item if isinstance(item, list) else []


JsonObject = Annotated[dict[str, Any], AfterValidator(_plain_json)]
Text = Annotated[str, Field(max_length=MAX_TEXT)]
ModelName = Annotated[str, Field(max_length=512)]
AdapterName = Annotated[str, Field(pattern=ADAPTER_NAME)]
CacheSalt = Annotated[str, Field(max_length=128)]
TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=1 << 20)]
Texts = Annotated[list[Text], Field(min_length=1, max_length=2048)]
TokenLists = Annotated[list[TokenIds], Field(min_length=1, max_length=2048)]


# --- messages and tools -----------------------------------------------------------------------


class TextPart(Strict):
    type: Literal["text"]
    text: Text


Members = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=MAX_TEXT)]],
    Field(min_length=1, max_length=256),
]


class SetContent(Strict):
    """Extension: texts whose order does not matter; parts beside one follow it directly."""

    type: Literal["set"]
    set: Members


ContentPart = Annotated[TextPart | SetContent, Field(discriminator="type")]
Content = Text | Annotated[list[ContentPart], Field(min_length=1, max_length=1024)]


class SystemMessage(Strict):
    role: Literal["system", "developer"]
    content: Content
    name: str | None = Field(None, max_length=64)


class UserMessage(Strict):
    role: Literal["user"]
    content: Content
    name: str | None = Field(None, max_length=64)


class CalledFunction(Strict):
    name: str = Field(max_length=64)
    arguments: Text = Field(description="A JSON object as text")


class MessageToolCall(Strict):
    id: str = Field(max_length=128)
    type: Literal["function"] = "function"
    function: CalledFunction


class AssistantMessage(Strict):
    """An earlier answer; the fields that are always null let a response be sent back as it is."""

    role: Literal["assistant"]
    content: Content | None = None
    name: str | None = Field(None, max_length=64)
    tool_calls: Annotated[list[MessageToolCall], Field(max_length=128)] | None = None
    refusal: Text | None = None
    annotations: Annotated[list[JsonObject], Field(max_length=128)] | None = None
    audio: None = None
    function_call: None = None

    @model_validator(mode="after")
    def _says_something(self) -> AssistantMessage:
        if self.content is None and not self.tool_calls:
            raise ValueError("an assistant message needs content or tool_calls")
        return self


class ToolMessage(Strict):
    role: Literal["tool"]
    content: Content
    tool_call_id: str = Field(max_length=128)


ChatMessage = Annotated[
    SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")
]


class FunctionDefinition(Strict):
    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")
    description: str | None = Field(None, max_length=1 << 16)
    parameters: JsonObject | None = None
    strict: bool | None = None


class ToolDefinition(Strict):
    type: Literal["function"]
    function: FunctionDefinition


class ChosenFunction(Strict):
    name: str = Field(max_length=64)


class NamedToolChoice(Strict):
    type: Literal["function"]
    function: ChosenFunction


# --- generation -------------------------------------------------------------------------------


class TextFormat(Strict):
    type: Literal["text"]


class JsonObjectFormat(Strict):
    type: Literal["json_object"]


class NamedSchema(Strict):
    model_config = ConfigDict(populate_by_name=True)

    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")
    description: str | None = Field(None, max_length=1 << 16)
    schema_: JsonObject | None = Field(None, alias="schema")
    strict: bool | None = None


class JsonSchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")
]


class StreamOptions(Strict):
    include_usage: bool | None = None


class SetPart(Strict):
    """Texts whose order does not matter (set-based prompting); each is tokenised alone."""

    set: Members


Parts = Annotated[list[Text | SetPart], Field(min_length=1, max_length=2048)]
ProgramHash = Annotated[str, Field(pattern=BLOB_ID)]
ProgramData = Annotated[
    JsonObject | ProgramHash,
    Field(description="A program (docs/interventions.md), or the hash of a stored one"),
]
BlobNames = Annotated[
    dict[Annotated[str, Field(max_length=128)], Annotated[str, Field(pattern=BLOB_ID)]],
    Field(max_length=1024, description="Ids of tensors (/v1/blobs) by the names in the program"),
]


class Generation(Strict):
    """What chat and plain completions share."""

    model: ModelName | None = Field(None, description='"base" or "base:adapter"; default the base')
    n: int | None = Field(None, ge=1, le=128)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: (
        Annotated[
            dict[str, Annotated[float, Field(ge=-100, le=100)]],
            Field(max_length=1024, description="By token id"),
        ]
        | None
    ) = None
    seed: int | None = Field(None, ge=-(2**63), le=2**64 - 1)
    stop: (
        Annotated[str, Field(min_length=1, max_length=256)]
        | Annotated[list[Annotated[str, Field(min_length=1, max_length=256)]], Field(max_length=16)]
        | None
    ) = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, max_length=512, description="Accepted, not used")
    top_k: int | None = Field(None, ge=0, le=MAX_TOKEN_ID, description="Extension; 0 = all")
    min_p: float | None = Field(None, ge=0, le=1, description="Extension")
    repetition_penalty: float | None = Field(None, ge=0.01, le=100, description="Extension")
    min_tokens: int | None = Field(None, ge=0, le=MAX_TOKEN_ID, description="Extension")
    ignore_eos: bool | None = Field(None, description="Extension")
    stop_token_ids: Annotated[list[TokenId], Field(max_length=256)] | None = Field(
        None, description="Extension"
    )
    prompt_logprobs: int | None = Field(
        None, ge=0, le=20, description="Extension: the prompt's tokens with so many alternatives"
    )
    guided_json: JsonObject | None = Field(None, description="Extension: JSON schema")
    guided_regex: str | None = Field(None, max_length=1 << 16, description="Extension")
    guided_choice: (
        Annotated[
            list[Annotated[str, Field(max_length=1024)]], Field(min_length=1, max_length=4096)
        ]
        | None
    ) = Field(None, description="Extension: the allowed answers")
    priority: int | None = Field(
        None, ge=-(2**31), le=2**31 - 1, description="Extension: smaller runs earlier"
    )
    fit_max_tokens: bool | None = Field(
        None, description="Extension: cut max_tokens to what the context holds"
    )
    cache_salt: CacheSalt | None = Field(
        None, description="Extension: prefixes are shared only within one salt (and key)"
    )
    return_token_ids: bool | None = Field(
        None, description="Extension: choices also have token_ids and the unparsed text"
    )
    interventions: ProgramData | None = Field(
        None, description="Extension: a program of edits and captures, or the hash of a stored one"
    )
    blobs: BlobNames | None = Field(None, description="Extension: tensors of the program")

    @model_validator(mode="after")
    def _whole_token_ids(self) -> Generation:
        for token in self.logit_bias or ():
            if not (token.isascii() and token.isdigit() and len(token) <= 10):
                raise ValueError("logit_bias: keys are token ids as text")
        return self

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> Generation:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only with stream = true")
        return self


class ChatRequest(Generation):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096)]
    tools: Annotated[list[ToolDefinition], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = Field(None, description="Accepted; the model decides")
    response_format: ResponseFormat | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    max_tokens: int | None = Field(None, ge=1, le=MAX_TOKEN_ID)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_TOKEN_ID)
    metadata: Annotated[dict[str, Text], Field(max_length=16)] | None = Field(
        None, description="Accepted, not used"
    )
    store: Literal[False] | None = None

    @model_validator(mode="after")
    def _alternatives_of_logprobs(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: only with logprobs = true")
        return self


class CompletionRequest(Generation):
    """Body of POST /v1/completions."""

    prompt: Text | TokenIds | Texts | TokenLists | Parts
    max_tokens: int | None = Field(
        16, ge=0, le=MAX_TOKEN_ID, description="0 only with echo; null = until the context is full"
    )
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=20)
    suffix: None = Field(None, description="Insertion is not supported")
    response_format: ResponseFormat | None = Field(None, description="Extension")

    @model_validator(mode="after")
    def _nothing_only_with_echo(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: 0 only with echo = true")
        return self


# --- measuring and tokens ---------------------------------------------------------------------


class EmbeddingRequest(Strict):
    """Body of POST /v1/embeddings."""

    model: ModelName | None = None
    input: Text | TokenIds | Texts | TokenLists
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1, le=1 << 20, description="Only the model's own size")
    user: str | None = Field(None, max_length=512, description="Accepted, not used")
    pooling: Literal["mean", "last"] = Field("mean", description="Extension")
    normalize: bool = Field(True, description="Extension")
    cache_salt: CacheSalt | None = Field(
        None, description="Extension: prefixes are shared only within one salt (and key)"
    )


class ScoreItem(Strict):
    """A text, or a text after a context; as strings, token ids, or texts and sets."""

    text: Text | TokenIds | Parts
    context: Text | TokenIds | Parts | None = None


class ScoreRequest(Strict):
    """Body of POST /v1/score."""

    model: ModelName | None = None
    items: Annotated[list[ScoreItem], Field(min_length=1, max_length=2048)]
    top: int = Field(0, ge=0, le=20, description="Alternatives beside each token")
    interventions: ProgramData | None = None
    blobs: BlobNames | None = None
    cache_salt: CacheSalt | None = Field(
        None, description="Prefixes are shared only within one salt (and key)"
    )


class ExplainRequest(Strict):
    """Body of POST /v1/explain: a program and the prompt it is meant for."""

    model: ModelName | None = None
    program: ProgramData
    prompt: Text | TokenIds | Parts | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096)] | None = None
    blobs: BlobNames | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> ExplainRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class RunRequest(Strict):
    """Body of POST /v1/run: a program, and one prompt or several."""

    model: ModelName | None = Field(None, description='"base" or "base:adapter"; default the base')
    program: ProgramData
    prompt: Text | TokenIds | Texts | TokenLists | Parts | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096)] | None = None
    blobs: BlobNames | None = None
    params: BlobNames | None = Field(None, description="Values of the program's parameters")
    cache_salt: CacheSalt | None = Field(
        None, description="Prefixes are shared only within one salt (and key)"
    )

    @model_validator(mode="after")
    def _one_of_both(self) -> RunRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class ProgramRequest(Strict):
    """Body of POST /v1/programs."""

    program: JsonObject


class TokenizeRequest(Strict):
    """Body of POST /tokenize: a text or a conversation."""

    model: ModelName | None = None
    text: Text | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096)] | None = None
    tools: Annotated[list[ToolDefinition], Field(max_length=128)] | None = None
    special: bool = Field(False, description="Add the tokenizer's begin and end tokens to a text")
    add_generation_prompt: bool = True

    @model_validator(mode="after")
    def _one_of_both(self) -> TokenizeRequest:
        if (self.text is None) == (self.messages is None):
            raise ValueError("give either text or messages")
        return self


class DetokenizeRequest(Strict):
    """Body of POST /detokenize."""

    model: ModelName | None = None
    tokens: Annotated[list[TokenId], Field(max_length=1 << 20)]


class AdapterRequest(Strict):
    """Body of POST /v1/adapters: a folder on the server, in the peft library's format."""

    name: AdapterName
    path: str = Field(min_length=1, max_length=4096)
