"""The LM interface over an engine in this process."""

from __future__ import annotations

import asyncio
import math
import threading
import time
import uuid
import weakref
from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Unpack

import torch

from invivo.adapter_archive import writing_adapter
from invivo.batches import (
    batch_of,
    check_messages,
    conversations_of,
    is_conversation,
    run_prompts_of,
    score_items_of,
    text_or_ids,
)
from invivo.chat_template import has_chat_template, render_chat
from invivo.engine.adapter_file import write_adapter
from invivo.engine.adapters import Source
from invivo.engine.carrying import adapters_of, why_not_carried
from invivo.engine.config import EngineConfig
from invivo.engine.detokenize import backend
from invivo.engine.engine import Engine
from invivo.engine.types import AdapterInfo, Output, Request, SamplingParams, TokenLogprob
from invivo.errors import InvalidRequest, MissingDependency, NotFound, Unavailable
from invivo.gather import Gathered, Gathering, failure_of
from invivo.lm import (
    LM,
    Blobs,
    Choice,
    Completion,
    Delta,
    Message,
    ModelInfo,
    ProgramLike,
    Prompt,
    Sampling,
    Score,
    ScoreItem,
    Token,
)
from invivo.marked_prompt import (
    MarkedPrompt,
    has_sets,
    is_parts,
    mark_chat,
    mark_parts,
    read_parts,
)
from invivo.models.load import LoadedModel, load_model
from invivo.models.sites import sites_of
from invivo.passing_thread import in_passing_thread
from invivo.program_body import program_of_job
from invivo.program_result import Array, ProgramResult
from invivo.programs import GivenProgram, Programs, as_array
from invivo.sampling import CHAT_TOKENS, GENERATE_TOKENS, Asked, asked_of
from invivo.tools import plan_tools

if TYPE_CHECKING:
    from invivo.jobs.service import JobService

T = TypeVar("T")


class LocalLM(LM):
    """A model served by an engine in this process.

    Args:
        model: what :func:`invivo.models.load.load_model` gave.
        config: sizes and switches of the engine.
        state: folder of its fine-tuning jobs, stored programs and tensors; None = jobs are kept in
            one for this model in the user's data folder, the rest in memory.

    Attributes:
        programs: what is stored, resolved and read of programs of interventions.
    """

    def __init__(
        self,
        model: LoadedModel,
        config: EngineConfig | None = None,
        *,
        state: str | Path | None = None,
    ) -> None:
        self.model = model
        self.state = None if state is None else Path(state).expanduser()
        self.engine = in_passing_thread(lambda: Engine(model, config))
        self._tokenizer = backend(model.tokenizer)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._texts: dict[int, str] = {}
        self._created = int(time.time())
        self._interpreting = threading.Lock()
        self.programs = Programs(
            model,
            # Not this object's methods: jobs hold programs, and a dropped model must go.
            partial(_encoded, self._tokenizer),
            partial(_decoded, self._tokenizer, model.config.vocab_size),
            capture_bytes=self.engine.config.max_capture_bytes,
            folder=self.state,
        )
        self.engine.start()
        # Also closes a model that is dropped without close(), or is open when the program ends.
        self._services: list[JobService] = []  # one, once there is a use for it
        self._opening = threading.Lock()
        self._close = weakref.finalize(self, _shut, self.engine, self._services)

    @classmethod
    def load(
        cls,
        name: str,
        *,
        device: str | None = None,
        dtype: str | None = None,
        adapters: Mapping[str, str | Path] | None = None,
        state: str | Path | None = None,
        **engine_options: Any,
    ) -> LocalLM:
        """Load a model by name and serve it; see :func:`invivo.load`."""
        try:
            config = EngineConfig(**engine_options)
        except TypeError as error:
            raise InvalidRequest(
                f"unknown engine option: {error}",
                remedy=f"Known: {', '.join(EngineConfig.__slots__)}",
            ) from error
        where = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model = in_passing_thread(lambda: load_model(name, device=where, dtype=dtype))
        lm = cls(model, config, state=state)
        try:
            for adapter, path in (adapters or {}).items():
                lm.load_adapter(adapter, path)
        except BaseException:
            lm.close()
            raise
        return lm

    # --- generation -------------------------------------------------------------------------
    def generate(self, prompt: Any, *, progress: bool = False, **sampling: Unpack[Sampling]) -> Any:
        prompts, single = batch_of(prompt)
        requests = self._generation(prompts, sampling)
        done = [self._completion(g) for g in self._run(requests, progress)]
        return done[0] if single else done

    async def agenerate(self, prompt: Any, **sampling: Unpack[Sampling]) -> Any:
        prompts, single = batch_of(prompt)
        requests = await _aside(sampling, lambda: self._generation(prompts, sampling))
        done = [self._completion(g) for g in await self._arun(requests)]
        return done[0] if single else done

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        progress: bool = False,
        **sampling: Unpack[Sampling],
    ) -> Any:
        conversations, single = conversations_of(messages)
        requests = self._conversation(conversations, tools, tool_choice, sampling)
        done = [self._completion(g) for g in self._run(requests, progress)]
        return done[0] if single else done

    async def achat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        **sampling: Unpack[Sampling],
    ) -> Any:
        conversations, single = conversations_of(messages)
        requests = await _aside(
            sampling, lambda: self._conversation(conversations, tools, tool_choice, sampling)
        )
        done = [self._completion(g) for g in await self._arun(requests)]
        return done[0] if single else done

    def stream(self, prompt: Prompt, **sampling: Unpack[Sampling]) -> Generator[Delta, None, None]:
        return self._stream(lambda: self._generation([prompt], sampling)[0])

    def astream(self, prompt: Prompt, **sampling: Unpack[Sampling]) -> AsyncGenerator[Delta, None]:
        return self._astream(sampling, lambda: self._generation([prompt], sampling)[0])

    def stream_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        **sampling: Unpack[Sampling],
    ) -> Generator[Delta, None, None]:
        return self._stream(lambda: self._conversation([messages], tools, tool_choice, sampling)[0])

    def astream_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        **sampling: Unpack[Sampling],
    ) -> AsyncGenerator[Delta, None]:
        return self._astream(
            sampling, lambda: self._conversation([messages], tools, tool_choice, sampling)[0]
        )

    # --- measuring --------------------------------------------------------------------------
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
        items, single = score_items_of(text)
        given = self._given(interventions, blobs)
        requests = [self._scoring(item, adapter, salt, top, given) for item in items]
        done = [self._score_of(g) for g in self._run(requests, progress)]
        return done[0] if single else done

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
        items, single = score_items_of(text)

        def make() -> list[Request]:
            given = self._given(interventions, blobs)
            return [self._scoring(item, adapter, salt, top, given) for item in items]

        requests = await _aside({"interventions": interventions}, make)
        done = [self._score_of(g) for g in await self._arun(requests)]
        return done[0] if single else done

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
        texts, single = batch_of(text)
        requests = [self._embedding(t, pooling, adapter, salt) for t in texts]
        done = [_vector(g, normalize) for g in self._run(requests, progress)]
        return done[0] if single else done

    async def aembed(
        self,
        text: str | list[int] | list[str] | list[list[int]],
        *,
        pooling: Literal["mean", "last"] = "mean",
        normalize: bool = True,
        adapter: str | None = None,
        salt: str = "",
    ) -> Any:
        texts, single = batch_of(text)
        requests = [self._embedding(t, pooling, adapter, salt) for t in texts]
        done = [_vector(g, normalize) for g in await self._arun(requests)]
        return done[0] if single else done

    # --- looking inside and changing --------------------------------------------------------
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
        prompts, single = run_prompts_of(prompt)
        requests = self._running(program, prompts, blobs, params, adapter, salt)
        carried = [r for r in requests if self._carries(r)]
        gathered = iter(self._run(carried, progress) if carried else ())
        done = [
            self._result(next(gathered)) if self._carries(r) else self._interpreted(r)
            for r in requests
        ]
        return done[0] if single else done

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
        prompts, single = run_prompts_of(prompt)
        requests = await asyncio.to_thread(
            self._running, program, prompts, blobs, params, adapter, salt
        )
        carried = [r for r in requests if self._carries(r)]
        gathered = iter(await self._arun(carried) if carried else ())
        done = [
            self._result(next(gathered))
            if self._carries(r)
            else await asyncio.to_thread(self._interpreted, r)
            for r in requests
        ]
        return done[0] if single else done

    def explain(
        self, program: ProgramLike, prompt: Any, *, blobs: Blobs | None = None
    ) -> dict[str, Any]:
        (request,) = self._running(program, [prompt], blobs, None, None, "")
        assert request.intervention is not None
        return self.programs.explain(request.intervention)

    def store_program(self, program: ProgramLike) -> str:
        return self.programs.store(program)

    def stored_program(self, name: str) -> dict[str, Any]:
        return self.programs.stored(name).to_dict()

    def _program_of_job(self, program: ProgramLike, blobs: Blobs) -> dict[str, Any]:
        return program_of_job(program, blobs, self.store_blob)

    def store_blob(self, value: Any) -> str:
        return self.programs.store_blob(value)

    def stored_blob(self, name: str) -> Array:
        return as_array(self.programs.blob(name))

    def marked(self, prompt: Any) -> MarkedPrompt:
        """A prompt of any form as the model sees it, with its sets and the turns of a chat."""
        if isinstance(prompt, MarkedPrompt):
            return prompt
        if is_conversation(prompt):
            return self.marked_chat(prompt)
        if is_parts(prompt):
            return mark_parts(read_parts(prompt), lambda t, s: self.tokenize(t, special=s))
        return MarkedPrompt(tuple(self._ids(prompt, special=True)))

    def marked_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> MarkedPrompt:
        """:meth:`marked` of a conversation with tools."""

        def render(some: Sequence[Mapping[str, Any]], answer_begins: bool) -> str:
            return self.apply_chat_template(some, tools=tools, add_generation_prompt=answer_begins)

        check_messages(messages)
        return mark_chat(messages, render, lambda t, s: self.tokenize(t, special=s))

    # --- tokens -----------------------------------------------------------------------------
    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        return _encoded(self._tokenizer, text, special)

    def detokenize(self, ids: Sequence[int]) -> str:
        return _decoded(self._tokenizer, self.model.config.vocab_size, ids)

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        if not self._has_chat_template:
            raise InvalidRequest(
                "the model has no chat template",
                field="messages",
                remedy="Use generate with a prompt, or a chat model",
            )
        check_messages(messages)
        return render_chat(
            self.model.tokenizer, messages, tools, add_generation_prompt=add_generation_prompt
        )

    # --- fine-tuning ------------------------------------------------------------------------
    @property
    def fine_tuning(self) -> JobService:
        """The job service of this model, opened at the first use: unfinished jobs go on then.

        Raises:
            Conflict: another process has the jobs of this model in hand.
            MissingDependency: the database library is not installed.
        """
        with self._opening:
            if not self._close.alive:
                raise Unavailable("the model is closed", remedy="Load it again")
            if not self._services:
                try:
                    from invivo.jobs.folder import default_state
                    from invivo.jobs.service import JobService
                except ModuleNotFoundError as error:
                    raise MissingDependency(
                        f"fine-tuning jobs need {error.name}",
                        remedy="Run: pip install 'invivo[serve]'",
                    ) from error
                folder = self.state or default_state(self.model.name, self.model.fingerprint)
                service = in_passing_thread(
                    lambda: JobService(self.engine, self.model, folder, self.programs)
                )
                self._services.append(service)
            return self._services[0]

    @property
    def has_jobs(self) -> bool:
        return bool(self._services)

    def resume_jobs(self) -> None:
        """Open the job service if its folder was named, or is there from before.

        Raises:
            Conflict: another process has the jobs of this model in hand.
        """
        from invivo.jobs.folder import default_state

        usual = default_state(self.model.name, self.model.fingerprint)
        if self.state is not None or usual.exists():
            self.fine_tuning  # noqa: B018

    # --- housekeeping -----------------------------------------------------------------------
    def info(self) -> ModelInfo:
        config = self.model.config
        weight = next(self.model.decoder.parameters())
        return ModelInfo(
            name=self.model.name,
            family=config.family,
            n_parameters=sum(p.numel() for p in self.model.decoder.parameters()),
            dtype=str(weight.dtype).removeprefix("torch."),
            device=str(weight.device),
            max_model_len=self.engine.scheduler.max_length,
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            fingerprint=self.model.fingerprint,
            created=self._created,
            has_chat_template=self._has_chat_template,
            sites=list(sites_of(config)),
        )

    def adapters(self) -> list[AdapterInfo]:
        return self.engine.adapters.list()

    def load_adapter(self, name: str, path: Source) -> AdapterInfo:
        """Also takes (config mapping, tensors by key) in place of a folder."""
        return self.engine.adapters.load(name, path)

    def save_adapter(self, name: str, folder: str | Path) -> Path:
        specs, parameters = self.engine.adapters.content(name)
        with writing_adapter(folder) as target:
            write_adapter(target, specs, parameters, self.model.config, self.model.name)
        return target

    def unload_adapter(self, name: str) -> None:
        self.engine.adapters.unload(name)

    def stats(self) -> dict[str, Any]:
        info = self.info()
        state = (
            "failed" if self.engine.failure else "draining" if not self._close.alive else "ready"
        )
        model = {
            "name": info.name,
            "parameters": info.n_parameters,
            "dtype": info.dtype,
            "device": info.device,
            "max_model_len": info.max_model_len,
        }
        return {**self.engine.stats().as_dict(), "state": state, "model": model}

    def close(self) -> None:
        self._close()

    # --- running requests -------------------------------------------------------------------
    def _run(self, requests: Sequence[Request], progress: bool) -> list[Gathered]:
        with _bar(len(requests), progress) as on_done:
            gathering = Gathering(self.engine, requests, on_done)
            gathering.start()
            try:
                return gathering.future.result()
            except BaseException:
                gathering.cancel()
                raise

    async def _arun(self, requests: Sequence[Request]) -> list[Gathered]:
        gathering = Gathering(self.engine, requests)
        try:
            if any(r.params.grammar is not None for r in requests):
                await asyncio.to_thread(gathering.start)  # compiling a grammar takes a while
            else:
                gathering.start()
            return await asyncio.wrap_future(gathering.future)
        except BaseException:
            gathering.cancel()
            raise

    def _stream(self, make: Callable[[], Request]) -> Generator[Delta, None, None]:
        request = make()
        written = _Written(request)
        queue: SimpleQueue[Output] = SimpleQueue()
        self.engine.submit(request, queue.put)
        try:
            while True:
                output = queue.get()
                yield self._delta(output, written)
                if output.final:
                    return
        finally:
            self.engine.abort(request.id)

    async def _astream(
        self, sampling: Mapping[str, Any], make: Callable[[], Request]
    ) -> AsyncGenerator[Delta, None]:
        request = await _aside(sampling, make)
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Output] = asyncio.Queue()
        written = _Written(request)
        gone = threading.Event()

        def put(output: Output) -> None:
            with suppress(RuntimeError):  # a loop that was closed took whoever waited with it
                loop.call_soon_threadsafe(queue.put_nowait, output)

        def submit() -> None:
            self.engine.submit(request, put)
            if gone.is_set():  # cancelled meanwhile, when there was nothing to abort yet
                self.engine.abort(request.id)

        try:
            if request.params.grammar is not None:
                await asyncio.to_thread(submit)
            else:
                submit()
            while True:
                output = await queue.get()
                yield self._delta(output, written)
                if output.final:
                    return
        finally:
            gone.set()
            self.engine.abort(request.id)

    # --- requests ---------------------------------------------------------------------------
    def _generation(self, prompts: Sequence[Prompt], sampling: Mapping[str, Any]) -> list[Request]:
        asked = asked_of(sampling, default_max_tokens=GENERATE_TOKENS)
        given = self._given(asked.interventions, asked.blobs)
        return [self._request(self.marked(p), asked, "cmpl", given) for p in prompts]

    def _conversation(
        self,
        conversations: Sequence[Sequence[Message]],
        tools: Sequence[Mapping[str, Any]] | None,
        tool_choice: str | Mapping[str, Any] | None,
        sampling: Mapping[str, Any],
    ) -> list[Request]:
        plan = plan_tools(
            [dict(t) for t in tools] if tools else None,
            dict(tool_choice) if isinstance(tool_choice, Mapping) else tool_choice,
        )
        if plan.json_schema is not None:
            sampling = {**sampling, "json_schema": plan.json_schema}
        asked = asked_of(sampling, default_max_tokens=CHAT_TOKENS)
        given = self._given(asked.interventions, asked.blobs)
        requests = []
        for messages in conversations:
            check_messages(messages)
            if given is not None or has_sets(messages):
                prompt = self.marked_chat(messages, tools=plan.render)
            else:
                text = self.apply_chat_template(messages, tools=plan.render)
                prompt = MarkedPrompt(tuple(self.tokenize(text)))
            requests.append(self._request(prompt, asked, "chatcmpl", given))
        return requests

    def _request(
        self, prompt: MarkedPrompt, asked: Asked, prefix: str, given: GivenProgram | None
    ) -> Request:
        params = asked.params
        taken = len(prompt.ids) + self.engine.adapters.n_virtual(asked.adapter)
        room = max(1, self.engine.scheduler.max_length - taken)
        if asked.default_length and params.max_tokens is not None:
            params = replace(params, max_tokens=min(params.max_tokens, room))
        n_new = room if params.max_tokens is None else min(params.max_tokens, room)
        if params.prompt_logprobs is not None:
            prompt = replace(prompt, n_past=0)
        return Request(
            id=_new_id(prefix),
            tokens=prompt.ids,
            params=params,
            n=asked.n,
            adapter=asked.adapter,
            salt=asked.salt,
            priority=asked.priority,
            intervention=self.programs.intervention(given, prompt, n_new=n_new),
            arrival=time.monotonic(),
        )

    def _given(self, program: ProgramLike, blobs: Blobs | None) -> GivenProgram | None:
        if program is None:
            if blobs:
                raise InvalidRequest(
                    "tensors belong to a program", field="blobs", remedy="Give interventions too"
                )
            return None
        return self.programs.given(program, blobs)

    def _running(
        self,
        program: ProgramLike,
        prompts: Sequence[Any],
        blobs: Blobs | None,
        params: Blobs | None,
        adapter: str | None,
        salt: str,
    ) -> list[Request]:
        given = self.programs.given(program, blobs, params)
        requests = []
        for prompt in prompts:
            marked = self.marked(prompt)
            requests.append(
                Request(
                    id=_new_id("run"),
                    tokens=marked.ids,
                    kind="run",
                    adapter=adapter,
                    salt=salt,
                    intervention=self.programs.intervention(given, marked),
                    arrival=time.monotonic(),
                )
            )
        return requests

    def _scoring(
        self,
        item: ScoreItem,
        adapter: str | None,
        salt: str,
        top: int,
        given: GivenProgram | None,
    ) -> Request:
        prompt, start = self.scored(item)
        return Request(
            id=_new_id("score"),
            tokens=prompt.ids,
            kind="score",
            params=SamplingParams(prompt_logprobs=top),
            adapter=adapter,
            salt=salt,
            score_from=start,
            intervention=self.programs.intervention(given, prompt),
            arrival=time.monotonic(),
        )

    def scored(self, item: ScoreItem) -> tuple[MarkedPrompt, int]:
        """The tokens of an item to score, and the first of them that is scored."""
        if isinstance(item, tuple) and is_parts(item[0]):
            prompt, start = self._after_parts(*item)
        elif isinstance(item, tuple):
            ids, start = self._pair(*item)
            prompt = MarkedPrompt(tuple(ids))
        else:
            prompt, start = self.marked(item), 1
        return replace(prompt, n_past=max(start - 1, 0)), start

    def _after_parts(self, context: Any, continuation: Prompt) -> tuple[MarkedPrompt, int]:
        """:meth:`_pair` after a context with sets; the last text goes on in the continuation."""
        given = text_or_ids(continuation)
        if not given:
            raise InvalidRequest(
                "the continuation must not be empty", field="text", given=continuation
            )
        parts = read_parts(context, "context")

        def mark(laid_out: Sequence[Any]) -> MarkedPrompt:
            return mark_parts(laid_out, lambda t, s: self.tokenize(t, special=s), "context")

        last = parts[-1]
        if isinstance(given, str) and isinstance(last, str):
            whole, before = mark([*parts[:-1], last + given]), mark([*parts[:-1], last.rstrip()])
        else:
            before = mark(parts)
            more = self._ids(given, special=False)
            whole = replace(before, ids=(*before.ids, *more))
        return whole, max(1, min(len(before.ids), len(whole.ids) - 1))

    def _pair(self, context: Prompt, continuation: Prompt) -> tuple[list[int], int]:
        """Tokens of context and continuation together, and where the continuation begins.

        The rule of the lm-evaluation harness: blanks at the end of the context move to the
        continuation, both are tokenised as one text, and the context's own tokens are cut off.
        """
        if not continuation:
            raise InvalidRequest(
                "the continuation must not be empty",
                field="text",
                given=continuation,
                remedy="Give the text whose log-probability is wanted",
            )
        if isinstance(context, str) and isinstance(continuation, str):
            bare = context.rstrip()
            whole = self.tokenize(context + continuation, special=True)
            start = len(self.tokenize(bare, special=True)) if bare else 0
        else:
            before = self._ids(context, special=True)
            whole = before + self._ids(continuation, special=False)
            start = len(before)
        if start == 0 and not self._adds_beginning(whole):
            whole, start = [self._beginning(), *whole], 1
        # A continuation that melts into the last word of the context is scored with that word.
        return whole, max(1, min(start, len(whole) - 1))

    def _adds_beginning(self, ids: Sequence[int]) -> bool:
        return bool(ids) and ids[0] == self.model.config.bos_token_id

    def _beginning(self) -> int:
        """The token that stands for the beginning of a text."""
        config = self.model.config
        if config.bos_token_id is not None:
            return config.bos_token_id
        if config.eos_token_ids:
            return config.eos_token_ids[0]
        raise InvalidRequest(
            "the model has no token for the beginning of a text",
            field="context",
            remedy="Give a context",
        )

    def _embedding(
        self, text: Prompt, pooling: Literal["mean", "last"], adapter: str | None, salt: str
    ) -> Request:
        return Request(
            id=_new_id("embd"),
            tokens=tuple(self._ids(text, special=True)),
            kind="embed",
            adapter=adapter,
            salt=salt,
            pooling=pooling,
            arrival=time.monotonic(),
        )

    def _ids(self, prompt: Prompt, *, special: bool) -> list[int]:
        given = text_or_ids(prompt)
        return self.tokenize(given, special=special) if isinstance(given, str) else given

    # --- answers ----------------------------------------------------------------------------
    @property
    def _has_chat_template(self) -> bool:
        return has_chat_template(self.model.tokenizer)

    def _completion(self, gathered: Gathered) -> Completion:
        request = gathered.request
        choices = [
            Choice(
                index=i,
                text="".join(strand.text),
                tokens=strand.tokens,
                finish_reason=strand.finish_reason or "error",
                logprobs=None if request.params.logprobs is None else self._tokens(strand.logprobs),
            )
            for i, strand in sorted(gathered.strands.items())
        ]
        return Completion(
            id=request.id,
            model=self.model.name,
            choices=choices,
            prompt_tokens=len(request.tokens),
            completion_tokens=sum(len(c.tokens) for c in choices),
            cached_tokens=gathered.cached_tokens,
            prompt_logprobs=None
            if gathered.prompt_logprobs is None
            else self._tokens(gathered.prompt_logprobs),
            program=self._program_of(gathered, choices[0].tokens),
        )

    def _program_of(
        self, gathered: Gathered, generated: Sequence[int] = ()
    ) -> ProgramResult | None:
        """What a request's program brought back, if it has one."""
        carried = gathered.request.intervention
        if gathered.program is None or carried is None:
            return None
        return self.programs.result(gathered.program, carried, generated)

    def _carries(self, request: Request) -> bool:
        """Whether the engine carries a request's program; the interpreter takes what is left."""
        return why_not_carried(request) is None

    def _result(self, gathered: Gathered) -> ProgramResult:
        result = self._program_of(gathered)
        assert result is not None
        return result

    def _interpreted(self, request: Request) -> ProgramResult:
        """A program that the engine does not carry yet; one at a time, for this is not sparing."""
        assert request.intervention is not None
        adapters = adapters_of(request)
        if adapters:
            for adapter in adapters:
                self._check_adapter(adapter)
            raise InvalidRequest(
                "this program goes through the interpreter, which knows the base model alone: "
                f"{why_not_carried(request)}",
                field="adapter",
                given=adapters,
            )
        with self._interpreting:
            output = self.programs.interpret(request.intervention)
        return self.programs.result(output, request.intervention)

    def _check_adapter(self, name: str) -> None:
        loaded = [adapter.name for adapter in self.adapters()]
        if name not in loaded:
            raise NotFound(
                "no such adapter is loaded",
                field="adapter",
                given=name,
                remedy=f"Loaded: {', '.join(loaded) or 'none'}",
            )

    def _delta(self, output: Output, written: _Written) -> Delta:
        error = failure_of(output)
        if error is not None:
            raise error
        return Delta(
            index=output.index,
            text=output.text,
            tokens=output.tokens,
            logprobs=None if output.logprobs is None else self._tokens(output.logprobs),
            finish_reason=output.finish_reason,
            cached_tokens=output.cached_tokens,
            prompt_logprobs=None
            if output.prompt_logprobs is None
            else self._tokens(output.prompt_logprobs),
            program=written.program(output, self.programs),
        )

    def _score_of(self, gathered: Gathered) -> Score:
        records = gathered.prompt_logprobs or []
        total = math.fsum(r.logprob for r in records)
        return Score(
            tokens=self._tokens(records),
            logprob=total,
            greedy=all(r.rank == 1 for r in records),
            perplexity=_exp(-total / len(records)),
            program=self._program_of(gathered),
        )

    def _tokens(self, records: Sequence[TokenLogprob]) -> list[Token]:
        return [
            Token(
                id=r.token,
                text=self._text(r.token),
                logprob=r.logprob,
                rank=r.rank,
                top=[
                    Token(id=t, text=self._text(t), logprob=lp, rank=place)
                    for place, (t, lp) in enumerate(r.top, start=1)
                ],
            )
            for r in records
        ]

    def _text(self, token: int) -> str:
        """Text of one token alone, its blank in front included."""
        text = self._texts.get(token)
        if text is None:
            text = str(self._tokenizer.decode([token], skip_special_tokens=False))
            piece = self._tokenizer.id_to_token(token) or ""
            if piece.startswith("\u2581") and not text.startswith(" "):
                text = " " + text
            self._texts[token] = text
        return text


class _Written:
    """What a stream has written so far, as far as its program needs it at the end."""

    def __init__(self, request: Request) -> None:
        self._carried = request.intervention
        self._tokens: list[int] = []

    def program(self, output: Output, programs: Programs) -> ProgramResult | None:
        """What the program brought back, in the output that has it."""
        if self._carried is None:
            return None
        self._tokens += output.tokens
        if output.program is None:
            return None
        return programs.result(output.program, self._carried, self._tokens)


async def _aside(sampling: Mapping[str, Any], make: Callable[[], T]) -> T:
    """``make()``, in a thread where a program has to be resolved, which may take a while."""
    if sampling.get("interventions") is not None:
        return await asyncio.to_thread(make)
    return make()


def _encoded(tokenizer: Any, text: str, special: bool) -> list[int]:
    if not isinstance(text, str):
        raise InvalidRequest("must be a text", field="text", given=text)
    try:
        return list(tokenizer.encode(text, add_special_tokens=special).ids)
    except TypeError as error:  # half of a surrogate pair
        raise InvalidRequest("is not valid Unicode", field="text", given=text) from error


def _decoded(tokenizer: Any, vocab_size: int, ids: Sequence[int]) -> str:
    for token in ids:
        if not isinstance(token, int) or not 0 <= token < vocab_size:
            raise InvalidRequest(
                f"must be token ids from 0 to {vocab_size - 1}", field="tokens", given=token
            )
    return str(tokenizer.decode(list(ids), skip_special_tokens=False))


def _shut(engine: Engine, services: Sequence[JobService]) -> None:
    """Jobs write a last checkpoint as the engine closes; then what it tells is recorded."""
    engine.close()
    for service in services:
        service.close()


def _new_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"


def _exp(x: float) -> float:
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


def _vector(gathered: Gathered, normalize: bool) -> list[float]:
    vector = gathered.embedding or []
    length = math.sqrt(math.fsum(x * x for x in vector))
    return [x / length for x in vector] if normalize and length > 0 else vector


@contextmanager
def _bar(total: int, shown: bool) -> Iterator[Callable[[], object] | None]:
    """A progress bar on standard error; gives what to call when one is done."""
    if not shown:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=total)
        yield lambda: progress.advance(task)
