"""Responses: what each route answers. Fields never set are left out of the JSON."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

FinishReason = Literal["stop", "length", "tool_calls"]


class Answer(BaseModel):
    model_config = ConfigDict(protected_namespaces=())


class ErrorDetail(Answer):
    message: str
    type: str
    param: str | None
    code: str
    remedy: str | None
    request_id: str


class ErrorAnswer(Answer):
    error: ErrorDetail


class PromptDetails(Answer):
    cached_tokens: int


class Usage(Answer):
    prompt_tokens: int
    total_tokens: int
    completion_tokens: int = 0
    prompt_tokens_details: PromptDetails | None = None


class TopLogprob(Answer):
    token: str
    logprob: float
    bytes: list[int] | None
    token_id: int | None = None
    rank: int | None = None


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Answer):
    content: list[TokenLogprob] | None
    refusal: None = None


class FunctionCall(Answer):
    name: str | None = None
    arguments: str


class ToolCallAnswer(Answer):
    id: str
    type: Literal["function"]
    function: FunctionCall


class ToolCallDelta(ToolCallAnswer):
    index: int


class AnswerMessage(Answer):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ToolCallAnswer] | None = None


class ProgramAnswer(Answer):
    """What a program brought back.

    Arrays are ``{"shape", "dtype", "data"}`` with the numbers in one list ("inf", "-inf" and "nan"
    as texts), or, where there are many, ``{"shape", "dtype", "offset"}``: they lie then in the blob
    that ``pools`` names for the dtype.
    """

    rows: list[dict[str, Any]]
    explain: dict[str, Any]
    meta: dict[str, Any]
    pools: dict[str, str] | None = None


class ChatChoice(Answer):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    text: str | None = None
    token_ids: list[int] | None = None
    prompt_logprobs: list[TokenLogprob] | None = None
    program: ProgramAnswer | None = None


class ChatCompletion(Answer):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str


class MessageDelta(Answer):
    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(Answer):
    index: int
    delta: MessageDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    text: str | None = None
    token_ids: list[int] | None = None
    cached_tokens: int | None = None
    prompt_logprobs: list[TokenLogprob] | None = None
    program: ProgramAnswer | None = None


class ChatChunk(Answer):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    system_fingerprint: str


class CompletionLogprobs(Answer):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]
    content: list[TokenLogprob] | None = None


class CompletionChoice(Answer):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    token_ids: list[int] | None = None
    cached_tokens: int | None = None
    prompt_logprobs: list[TokenLogprob] | None = None
    program: ProgramAnswer | None = None


class CompletionAnswer(Answer):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    system_fingerprint: str


class Embedding(Answer):
    index: int
    object: Literal["embedding"]
    embedding: list[float] | str


class EmbeddingList(Answer):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: Usage


class ScoredToken(Answer):
    id: int
    token: str
    logprob: float
    rank: int
    top: list[ScoredToken]


class ScoreAnswer(Answer):
    index: int
    object: Literal["score"]
    tokens: list[ScoredToken]
    logprob: float
    greedy: bool
    perplexity: float
    program: ProgramAnswer | None = None


class ScoreList(Answer):
    object: Literal["list"]
    data: list[ScoreAnswer]
    model: str
    usage: Usage


class RunList(Answer):
    object: Literal["list"]
    data: list[ProgramAnswer]
    model: str
    usage: Usage


class Explained(Answer):
    object: Literal["explanation"]
    explain: dict[str, Any]


class StoredProgram(Answer):
    id: str
    object: Literal["program"]
    bytes: int
    program: dict[str, Any] | None = None


class StoredProgramList(Answer):
    object: Literal["list"]
    data: list[StoredProgram]


class Blob(Answer):
    id: str
    object: Literal["blob"]
    bytes: int
    name: str | None = None
    shape: list[int] | None = None
    dtype: str | None = None


class BlobList(Answer):
    object: Literal["list"]
    data: list[Blob]


class Forgotten(Answer):
    id: str
    deleted: bool


class Tokens(Answer):
    tokens: list[int]
    count: int
    max_model_len: int
    text: str


class DetokenizedText(Answer):
    text: str


class Model(Answer):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int
    family: str
    n_parameters: int
    dtype: str
    device: str
    vocab_size: int
    hidden_size: int
    fingerprint: str
    has_chat_template: bool
    sites: list[str]


class ModelList(Answer):
    object: Literal["list"]
    data: list[Model]


class Adapter(Answer):
    name: str
    object: Literal["adapter"]
    model: str
    version: int
    rank: int
    running: int
    n_parameters: int


class AdapterList(Answer):
    object: Literal["list"]
    data: list[Adapter]


class Deleted(Answer):
    name: str
    object: Literal["adapter"]
    deleted: bool


class Health(Answer):
    status: str


class LiveSnapshot(Answer):
    """The engine's statistics; described in docs/metrics.md."""

    model_config = ConfigDict(extra="allow")

    state: str
    model: dict[str, Any]


class TrainingRun(Answer):
    """One run of ``invivo train``; lists are thinned.

    ``held_out`` has [step, value] of ``measure``, ``curve`` [step, loss, learning rate].
    """

    name: str
    status: str
    step: int
    steps: int
    parameters: int
    tokens: int
    tokens_per_second: float | None
    loss: float | None
    measure: Literal["bits_per_byte", "accuracy"]
    held_out: list[tuple[int, float]]
    curve: list[tuple[int, float, float]]


class TrainingRunList(Answer):
    object: Literal["list"]
    data: list[TrainingRun]
