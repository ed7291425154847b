"""The LM interface: one model, in this process or behind HTTP, the same calls.

``invivo.load(name)`` gives a :class:`LocalLM` (an engine in this process),
``invivo.connect(url)`` a :class:`RemoteLM`. Everything above this floor (instruments, tasks,
studies, the server's pages) is written against :class:`LM` alone.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypedDict, Unpack, overload

from invivo.engine.types import AdapterInfo
from invivo.lm_jobs import Data, FileInfo, FineTuningBackend, Job, start_job, upload
from invivo.marked_prompt import MarkedPrompt
from invivo.program_result import Array, ProgramResult

__all__ = [
    "LM",
    "AdapterInfo",
    "Choice",
    "Completion",
    "Delta",
    "FileInfo",
    "Job",
    "Message",
    "ModelInfo",
    "ProgramResult",
    "Prompt",
    "Sampling",
    "Score",
    "ScoreItem",
    "Token",
]

# A text, token ids, or texts and sets (see invivo.marked_prompt).
Prompt = str | Sequence[int] | Sequence[str | Mapping[str, Any]] | MarkedPrompt
# A program of edits and captures: its JSON form as data or as text, a Program, what the builder
# gives, or the hash under which one is stored.
ProgramLike = Any
Blobs = Mapping[str, Any]  # tensors, arrays, nested lists or ids of stored ones, by name
Message = Mapping[str, Any]  # {"role": ..., "content": ..., and what the chat template knows}
ScoreItem = Prompt | tuple[Prompt, Prompt]


@dataclass(slots=True)
class Token:
    """One token with its text and natural-log probability."""

    id: int
    text: str
    logprob: float
    rank: int = 0
    top: list[Token] = field(default_factory=list)


@dataclass(slots=True)
class Choice:
    index: int
    text: str
    tokens: list[int]
    finish_reason: str
    logprobs: list[Token] | None = None


@dataclass(slots=True)
class Completion:
    """The answer to one prompt; ``text`` is the first choice's.

    ``program`` is what a program of interventions brought back.
    """

    id: str
    model: str
    choices: list[Choice]
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    prompt_logprobs: list[Token] | None = None
    program: ProgramResult | None = None

    @property
    def text(self) -> str:
        return self.choices[0].text


@dataclass(slots=True)
class Delta:
    """A piece of a stream: newly settled text of one choice.

    ``cached_tokens`` (of the prompt) is the same in every piece of a choice; ``prompt_logprobs``
    come once, in the first piece of choice 0; ``finish_reason`` in the last piece of each choice,
    and so does ``program``.
    """

    index: int
    text: str
    tokens: list[int]
    logprobs: list[Token] | None = None
    finish_reason: str | None = None
    cached_tokens: int = 0
    prompt_logprobs: list[Token] | None = None
    program: ProgramResult | None = None


@dataclass(slots=True)
class Score:
    """Log-probabilities of given tokens: the lm-evaluation primitive.

    ``tokens`` are the scored ones only; ``logprob`` is their sum, ``greedy`` whether each was
    the most probable token, ``perplexity`` is exp(-logprob / len(tokens)).
    """

    tokens: list[Token]
    logprob: float
    greedy: bool
    perplexity: float
    program: ProgramResult | None = None


@dataclass(slots=True)
class ModelInfo:
    """What is being served; ``sites`` are the quantities that programs may read or change here."""

    name: str
    family: str
    n_parameters: int
    dtype: str
    device: str
    max_model_len: int
    vocab_size: int
    hidden_size: int
    fingerprint: str
    created: int  # Unix seconds at which it was loaded
    has_chat_template: bool
    sites: list[str] = field(default_factory=list)


class Sampling(TypedDict, total=False):
    """Keyword arguments of every generating call; the fields of ``SamplingParams`` and a few more.

    At most one of ``json_schema`` (a mapping, a JSON text or ``True`` for any JSON object),
    ``regex`` and ``choice`` (the allowed answers) constrains the output. ``interventions`` is a
    program of edits and captures (docs/interventions.md), ``blobs`` the tensors it names.
    """

    max_tokens: int | None
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    seed: int | None
    min_tokens: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    logprobs: int | None
    prompt_logprobs: int | None
    n: int
    adapter: str | None
    salt: str
    priority: int
    json_schema: Mapping[str, Any] | str | bool
    regex: str
    choice: Sequence[str]
    interventions: ProgramLike
    blobs: Blobs | None


class LM(ABC):
    """One language model. A prompt is a string or a list of token ids.

    A single prompt gives a single answer, a list of prompts a list in the same order. Iterators
    cancel their request when closed. Every method ``m`` that may wait has an ``async`` twin
    ``am``. Errors are those of :mod:`invivo.errors`.
    """

    # --- generation -------------------------------------------------------------------------
    @overload
    def generate(
        self, prompt: str | list[int], *, progress: bool = False, **sampling: Unpack[Sampling]
    ) -> Completion: ...
    @overload
    def generate(
        self,
        prompt: list[str] | list[list[int]],
        *,
        progress: bool = False,
        **sampling: Unpack[Sampling],
    ) -> list[Completion]: ...
    @overload
    def generate(
        self, prompt: Any, *, progress: bool = False, **sampling: Unpack[Sampling]
    ) -> Any: ...
    @abstractmethod
    def generate(self, prompt: Any, *, progress: bool = False, **sampling: Unpack[Sampling]) -> Any:
        """Continue the prompt, or each of several prompts, all in one batch.

        Args:
            prompt: one prompt or a list of prompts; a prompt with sets is a list of texts and
                ``{"set": [...]}``.
            progress: show a progress bar over the prompts.
            sampling: see :class:`Sampling`; ``max_tokens`` is 128 unless said.

        Raises:
            InvalidRequest: a parameter is out of range, or the prompt does not fit.
            NotFound: the adapter is not loaded.
        """

    @abstractmethod
    async def agenerate(self, prompt: Any, **sampling: Unpack[Sampling]) -> Any:
        """:meth:`generate`; a cancelled task cancels its requests."""

    @abstractmethod
    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        progress: bool = False,
        **sampling: Unpack[Sampling],
    ) -> Any:
        """Answer a conversation (or each of several) through the model's chat template.

        Args:
            messages: mappings with ``role`` and ``content``; a list of such lists is a batch.
            tools: function descriptions in the OpenAI shape, rendered by the template.
            tool_choice: "auto", "none", "required", or a named function in the OpenAI shape;
                the last two constrain the answer to a call written as JSON.
            sampling: as for :meth:`generate`; ``max_tokens`` is 512 unless said.

        Returns:
            A :class:`Completion`, or a list of them for a batch.
        """

    @abstractmethod
    async def achat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        **sampling: Unpack[Sampling],
    ) -> Any:
        """:meth:`chat`; a cancelled task cancels its requests."""

    @abstractmethod
    def stream(self, prompt: Prompt, **sampling: Unpack[Sampling]) -> Generator[Delta, None, None]:
        """Yield the continuation piece by piece; closing the iterator cancels the request."""

    @abstractmethod
    def astream(self, prompt: Prompt, **sampling: Unpack[Sampling]) -> AsyncGenerator[Delta, None]:
        """:meth:`stream` as an asynchronous iterator."""

    @abstractmethod
    def stream_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        **sampling: Unpack[Sampling],
    ) -> Generator[Delta, None, None]:
        """Yield the answer to a conversation piece by piece."""

    @abstractmethod
    def astream_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        **sampling: Unpack[Sampling],
    ) -> AsyncGenerator[Delta, None]:
        """:meth:`stream_chat` as an asynchronous iterator."""

    # --- measuring --------------------------------------------------------------------------
    @abstractmethod
    def score(
        self,
        text: ScoreItem | list[Any],
        *,
        adapter: str | None = None,
        salt: str = "",
        top: int = 0,
        interventions: ProgramLike = None,
        blobs: Blobs | None = None,
        progress: bool = False,
    ) -> Any:
        """Log-probabilities of a text, or of a continuation after a context.

        A string is scored from its second token (from its first where the tokenizer puts a
        beginning-of-text token before it). A pair ``(context, continuation)`` is tokenised as
        one text and scored over the continuation's tokens; blanks at the end of the context
        count to the continuation, because that is how tokenizers cut words. An empty context
        stands for the beginning of a text. A *tuple* is one pair, a *list* of strings, of token
        lists or of tuples is a batch.

        Args:
            top: how many alternatives to return beside each token, at most 20.
            interventions: a program of edits and captures, and ``blobs`` the tensors it names.

        Returns:
            A :class:`Score`, or a list of them for a batch.
        """

    @abstractmethod
    async def ascore(
        self,
        text: ScoreItem | list[Any],
        *,
        adapter: str | None = None,
        salt: str = "",
        top: int = 0,
        interventions: ProgramLike = None,
        blobs: Blobs | None = None,
    ) -> Any:
        """:meth:`score`; a cancelled task cancels its requests."""

    @abstractmethod
    def embed(
        self,
        text: str | list[int] | list[str] | list[list[int]],
        *,
        pooling: Literal["mean", "last"] = "mean",
        normalize: bool = True,
        adapter: str | None = None,
        salt: str = "",
        progress: bool = False,
    ) -> Any:
        """Pooled final hidden states: a list of floats, or a list of such lists for a batch."""

    @abstractmethod
    async def aembed(
        self,
        text: str | list[int] | list[str] | list[list[int]],
        *,
        pooling: Literal["mean", "last"] = "mean",
        normalize: bool = True,
        adapter: str | None = None,
        salt: str = "",
    ) -> Any:
        """:meth:`embed`; a cancelled task cancels its requests."""

    # --- looking inside and changing --------------------------------------------------------
    @abstractmethod
    def run(
        self,
        program: ProgramLike,
        prompt: Any,
        *,
        blobs: Blobs | None = None,
        params: Blobs | None = None,
        adapter: str | None = None,
        salt: str = "",
        progress: bool = False,
    ) -> Any:
        """Carry out a program of edits and captures on a prompt; no text is generated.

        Args:
            program: JSON data or text, a Program, what the builder gives, or the hash of a stored
                one; docs/interventions.md describes the language.
            prompt: a text, token ids, texts with sets, or messages; a list of such is a batch.
            blobs: tensors, arrays, nested lists or ids of stored ones, by the names in the program.
            params: values of its trainable parameters; the others have their start values.

        Returns:
            A :class:`ProgramResult`, or a list of them for a batch.

        Raises:
            InvalidRequest: the program cannot be carried out as written; the field is the path.
            TooLarge: it asks for more than may be.
            NotFound: a stored program, a tensor or an adapter is not there.
        """

    @abstractmethod
    async def arun(
        self,
        program: ProgramLike,
        prompt: Any,
        *,
        blobs: Blobs | None = None,
        params: Blobs | None = None,
        adapter: str | None = None,
        salt: str = "",
    ) -> Any:
        """:meth:`run`; a cancelled task cancels its requests."""

    @abstractmethod
    def explain(
        self, program: ProgramLike, prompt: Any, *, blobs: Blobs | None = None
    ) -> dict[str, Any]:
        """What a program would do on a prompt, before anything runs.

        Resolved positions with their tokens, order, passes, shapes and bytes of captures, cost.
        Errors are those of :meth:`run`.
        """

    @abstractmethod
    def store_program(self, program: ProgramLike) -> str:
        """Keep a program; its hash ("sha256:...") stands for it from then on."""

    @abstractmethod
    def stored_program(self, name: str) -> dict[str, Any]:
        """The JSON form of a stored program. Raises NotFound."""

    @abstractmethod
    def store_blob(self, value: Any) -> str:
        """Keep a tensor or an array; programs name it "blob:" and the id that is returned."""

    @abstractmethod
    def stored_blob(self, name: str) -> Array:
        """A stored tensor as an array. Raises NotFound."""

    # --- tokens -----------------------------------------------------------------------------
    @abstractmethod
    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of ``text``; ``special`` adds the tokenizer's own beginning and end tokens."""

    @abstractmethod
    def detokenize(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens included."""

    @abstractmethod
    def apply_chat_template(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The text that a conversation becomes before the model sees it."""

    # --- fine-tuning ------------------------------------------------------------------------
    @property
    @abstractmethod
    def fine_tuning(self) -> FineTuningBackend:
        """What keeps the files and jobs of this model."""

    @property
    def has_jobs(self) -> bool:
        """Whether ``fine_tuning`` is at hand without opening a folder first."""
        return False

    def resume_jobs(self) -> None:  # noqa: B027
        """Go on with what an earlier process has left; what is served over HTTP does so itself."""

    def finetune(
        self,
        data: Data,
        *,
        validation: Data | None = None,
        name: str | None = None,
        metadata: Mapping[str, str] | None = None,
        program: ProgramLike = None,
        blobs: Blobs | None = None,
        **hyperparameters: Any,
    ) -> Job:
        """Learn an adapter from ``data`` beside the requests; returns once the data is validated.

        Args:
            data: a .jsonl or .txt file, a list of examples, or the id of an uploaded file. An
                example is ``{"messages": [...]}``, ``{"prompt": ..., "completion": ...}`` or
                ``{"text": ...}``.
            validation: held-out examples, as ``data``: their loss is in ``info().validations``.
            name: of the adapter: ``generate(..., adapter=name)`` uses it when the job is done.
            metadata: kept with the job.
            program: parameters of this program are trained in place of an adapter, those that
                ``train`` names; the result is a program with their values, whose hash is
                ``info().fine_tuned_model``: ``run(hash, ...)`` or ``interventions=hash``.
            blobs: the tensors that it names.
            hyperparameters: fields of :class:`invivo.lm_jobs.Hyperparameters`.

        Raises:
            InvalidRequest: bad lines in the data (the message names them), or a hyperparameter.
            NotFound: there is no such file.
            Conflict: a job of this name has not ended.
        """
        if program is not None:
            hyperparameters |= self._program_of_job(program, blobs or {})
        return start_job(
            self.fine_tuning,
            data,
            validation=validation,
            name=name,
            metadata=metadata,
            **hyperparameters,
        )

    @abstractmethod
    def _program_of_job(self, program: ProgramLike, blobs: Blobs) -> dict[str, Any]:
        """The hyperparameters of a program in any of its forms; its tensors are stored."""

    def jobs(self) -> list[Job]:
        """All fine-tuning jobs, newest first."""
        backend, found = self.fine_tuning, list[Job]()
        while True:
            page = backend.jobs(100, found[-1].id if found else None)
            found += [Job(info.id, backend) for info in page]
            if len(page) < 100:
                return found

    def job(self, job_id: str) -> Job:
        """Raises NotFound."""
        return Job(self.fine_tuning.job(job_id).id, self.fine_tuning)

    def upload_file(self, data: Data) -> FileInfo:
        """Training data for any number of jobs; see :meth:`finetune`."""
        return upload(self.fine_tuning, data)

    def files(self) -> list[FileInfo]:
        """The uploaded files, newest first."""
        return self.fine_tuning.files()

    def delete_file(self, file_id: str) -> None:
        """Raises Conflict while a job needs it."""
        self.fine_tuning.delete_file(file_id)

    # --- housekeeping -----------------------------------------------------------------------
    @abstractmethod
    def info(self) -> ModelInfo:
        """What is being served."""

    @abstractmethod
    def adapters(self) -> list[AdapterInfo]:
        """The loaded adapters."""

    @abstractmethod
    def load_adapter(self, name: str, path: str | Path) -> AdapterInfo:
        """Load an adapter in the peft library's format; an existing name gets a new version."""

    @abstractmethod
    def save_adapter(self, name: str, folder: str | Path) -> Path:
        """Write the current version of a loaded adapter (or a checkpoint, ``NAME:ckpt-step-N``) to
        ``folder`` in the peft library's format; its two files there are replaced.

        Raises:
            NotFound: no such adapter is loaded.
            InvalidRequest: the folder cannot be written to.
        """

    @abstractmethod
    def unload_adapter(self, name: str) -> None:
        """Forget an adapter; requests that run with it finish first."""

    @abstractmethod
    def stats(self) -> dict[str, Any]:
        """The live snapshot described in ``docs/architecture.md``."""

    @abstractmethod
    def close(self) -> None:
        """Cancel what runs and give everything back; calling it twice is harmless."""

    # --- asynchronous twins of what is quick here and a round trip elsewhere ------------------
    async def ainfo(self) -> ModelInfo:
        return await asyncio.to_thread(self.info)

    async def aadapters(self) -> list[AdapterInfo]:
        return await asyncio.to_thread(self.adapters)

    async def aload_adapter(self, name: str, path: str | Path) -> AdapterInfo:
        return await asyncio.to_thread(self.load_adapter, name, path)

    async def asave_adapter(self, name: str, folder: str | Path) -> Path:
        return await asyncio.to_thread(self.save_adapter, name, folder)

    async def aunload_adapter(self, name: str) -> None:
        await asyncio.to_thread(self.unload_adapter, name)

    async def aexplain(
        self, program: ProgramLike, prompt: Any, *, blobs: Blobs | None = None
    ) -> dict[str, Any]:
        return await asyncio.to_thread(self.explain, program, prompt, blobs=blobs)

    async def astore_program(self, program: ProgramLike) -> str:
        return await asyncio.to_thread(self.store_program, program)

    async def astored_program(self, name: str) -> dict[str, Any]:
        return await asyncio.to_thread(self.stored_program, name)

    async def astore_blob(self, value: Any) -> str:
        return await asyncio.to_thread(self.store_blob, value)

    async def astored_blob(self, name: str) -> Array:
        return await asyncio.to_thread(self.stored_blob, name)

    async def astats(self) -> dict[str, Any]:
        return await asyncio.to_thread(self.stats)

    async def atokenize(self, text: str, *, special: bool = False) -> list[int]:
        return await asyncio.to_thread(self.tokenize, text, special=special)

    async def adetokenize(self, ids: Sequence[int]) -> str:
        return await asyncio.to_thread(self.detokenize, ids)

    async def aapply_chat_template(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        return await asyncio.to_thread(
            self.apply_chat_template,
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
        )

    async def afinetune(
        self,
        data: Data,
        *,
        validation: Data | None = None,
        name: str | None = None,
        metadata: Mapping[str, str] | None = None,
        program: ProgramLike = None,
        blobs: Blobs | None = None,
        **hyperparameters: Any,
    ) -> Job:
        return await asyncio.to_thread(
            self.finetune,
            data,
            validation=validation,
            name=name,
            metadata=metadata,
            program=program,
            blobs=blobs,
            **hyperparameters,
        )

    async def ajobs(self) -> list[Job]:
        return await asyncio.to_thread(self.jobs)

    async def ajob(self, job_id: str) -> Job:
        return await asyncio.to_thread(self.job, job_id)

    async def aupload_file(self, data: Data) -> FileInfo:
        return await asyncio.to_thread(self.upload_file, data)

    async def afiles(self) -> list[FileInfo]:
        return await asyncio.to_thread(self.files)

    async def adelete_file(self, file_id: str) -> None:
        await asyncio.to_thread(self.delete_file, file_id)

    async def aclose(self) -> None:
        await asyncio.to_thread(self.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
