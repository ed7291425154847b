"""A model behind HTTP with the methods of one in this process.

The plain and the ``async`` methods share their connections and may be used from any thread or
event loop. The server's errors come back as the classes of :mod:`invivo.errors`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from contextlib import aclosing, closing
from pathlib import Path
from typing import Any, Literal, Unpack, cast
from urllib.parse import quote

from invivo.adapter_archive import ADAPTER_FILES, unpacked, writing_adapter
from invivo.batches import (
    batch_of,
    conversations_of,
    is_conversation,
    run_prompts_of,
    score_items_of,
    text_or_ids,
)
from invivo.engine.types import AdapterInfo
from invivo.errors import InvalidRequest
from invivo.lm import (
    LM,
    Blobs,
    Delta,
    Message,
    ModelInfo,
    ProgramLike,
    Prompt,
    Sampling,
    ScoreItem,
)
from invivo.program_body import (
    array_of,
    program_body,
    program_of_job,
    read_arrays,
    write_arrays,
)
from invivo.program_result import Array, ProgramResult, result_of
from invivo.remote_jobs import RemoteJobs
from invivo.transport import Transport
from invivo.wire import (
    JsonBody,
    adapter_of,
    chat_body,
    completion_body,
    completion_of,
    delta_of,
    message_body,
    model_of,
    prompt_body,
    score_of,
)

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
BLOBS = "/v1/blobs"
_ITEMS_AT_ONCE = 256  # texts in one scoring or embedding request
_BLOBS_AT_ONCE = 32


def connect(url: str, *, key: str | None = None, timeout: float = 600.0) -> RemoteLM:
    """The model served at ``url`` (with or without ``/v1``).

    Args:
        key: bearer key, where the server asks for one.
        timeout: seconds that the server may be silent during a request.

    Raises:
        Unavailable: nothing answers there.
        Unauthorized: the server wants another key.
    """
    return RemoteLM(url, key=key, timeout=timeout)


class RemoteLM(LM):
    """See :func:`connect`; the methods are those of :class:`invivo.lm.LM`."""

    def __init__(self, url: str, *, key: str | None = None, timeout: float = 600.0) -> None:
        if not url.startswith(("http://", "https://")):
            raise InvalidRequest(
                "is no address of a server",
                field="url",
                given=url,
                remedy="Write http://HOST:PORT, as `invivo serve` prints it",
            )
        self.url = url.rstrip("/").removesuffix("/v1")
        self._http = Transport(self.url, key=key, timeout=timeout)
        try:
            listed = self._http.wait(self._http.request("GET", "/v1/models"))
        except BaseException:
            self._http.close()
            raise
        self._info = model_of(listed["data"][0])

    # --- generation -------------------------------------------------------------------------

    def generate(self, prompt: Any, *, progress: bool = False, **sampling: Unpack[Sampling]) -> Any:
        return self._http.wait(self._generate(prompt, sampling, progress))

    async def agenerate(self, prompt: Any, **sampling: Unpack[Sampling]) -> Any:
        return await self._http.hop(self._generate(prompt, sampling))

    def chat(
        self,
        messages: Any,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        progress: bool = False,
        **sampling: Unpack[Sampling],
    ) -> Any:
        return self._http.wait(self._chat(messages, tools, tool_choice, sampling, progress))

    async def achat(
        self,
        messages: Any,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        **sampling: Unpack[Sampling],
    ) -> Any:
        return await self._http.hop(self._chat(messages, tools, tool_choice, sampling))

    def stream(self, prompt: Prompt, **sampling: Unpack[Sampling]) -> Generator[Delta, None, None]:
        body = completion_body(self._info.name, prompt, sampling)
        return self._deltas(COMPLETIONS, body, sampling)

    def astream(self, prompt: Prompt, **sampling: Unpack[Sampling]) -> AsyncGenerator[Delta, None]:
        body = completion_body(self._info.name, prompt, sampling)
        return self._adeltas(COMPLETIONS, body, sampling)

    def stream_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        **sampling: Unpack[Sampling],
    ) -> Generator[Delta, None, None]:
        body = chat_body(self._info.name, messages, tools, tool_choice, sampling)
        return self._deltas(CHAT, body, sampling)

    def astream_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        **sampling: Unpack[Sampling],
    ) -> AsyncGenerator[Delta, None]:
        body = chat_body(self._info.name, messages, tools, tool_choice, sampling)
        return self._adeltas(CHAT, body, sampling)

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
        work = self._score(text, adapter, salt, top, interventions, blobs, progress)
        return self._http.wait(work)

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
        work = self._score(text, adapter, salt, top, interventions, blobs)
        return await self._http.hop(work)

    def embed(
        self,
        text: Any,
        *,
        pooling: Literal["mean", "last"] = "mean",
        normalize: bool = True,
        adapter: str | None = None,
        salt: str = "",
        progress: bool = False,
    ) -> Any:
        return self._http.wait(self._embed(text, pooling, normalize, adapter, salt, progress))

    async def aembed(
        self,
        text: Any,
        *,
        pooling: Literal["mean", "last"] = "mean",
        normalize: bool = True,
        adapter: str | None = None,
        salt: str = "",
    ) -> Any:
        return await self._http.hop(self._embed(text, pooling, normalize, adapter, salt))

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
        return self._http.wait(
            self._run(program, prompt, blobs, params, adapter, salt, progress=progress)
        )

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
        return await self._http.hop(self._run(program, prompt, blobs, params, adapter, salt))

    def explain(
        self, program: ProgramLike, prompt: Any, *, blobs: Blobs | None = None
    ) -> dict[str, Any]:
        return self._http.wait(self._explain(program, prompt, blobs))

    def store_program(self, program: ProgramLike) -> str:
        return self._http.wait(self._store_program(program))

    def stored_program(self, name: str) -> dict[str, Any]:
        path = f"/v1/programs/{quote(name, safe='')}"
        return cast(dict[str, Any], self._http.wait(self._http.request("GET", path))["program"])

    def _program_of_job(self, program: ProgramLike, blobs: Blobs) -> dict[str, Any]:
        return program_of_job(program, blobs, self.store_blob)

    def store_blob(self, value: Any) -> str:
        sent = self._upload({"value": array_of(value, "value")}, lasting=True)
        return self._http.wait(sent)["value"]

    def stored_blob(self, name: str) -> Array:
        return self._http.wait(self._arrays([name]))[name]

    # --- tokens -----------------------------------------------------------------------------

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        return cast(list[int], self._post("/tokenize", text=text, special=special)["tokens"])

    def detokenize(self, ids: Sequence[int]) -> str:
        return str(self._post("/detokenize", tokens=list(ids))["text"])

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        answer = self._post(
            "/tokenize",
            messages=[message_body(message) for message in messages],
            tools=list(tools or ()),
            add_generation_prompt=add_generation_prompt,
        )
        return str(answer["text"])

    # --- housekeeping -----------------------------------------------------------------------

    def info(self) -> ModelInfo:
        return self._info

    def adapters(self) -> list[AdapterInfo]:
        listed = self._http.wait(self._http.request("GET", "/v1/adapters"))
        return [adapter_of(one) for one in listed["data"]]

    def load_adapter(self, name: str, path: str | Path) -> AdapterInfo:
        """Uploads the two files of the local folder ``path``."""
        folder = Path(path)
        try:
            config, weights = ((folder / name).read_bytes() for name in ADAPTER_FILES)
        except OSError as error:
            raise InvalidRequest(
                "not a folder with adapter_config.json and adapter_model.safetensors",
                field="path",
                given=str(path),
                remedy="Give the folder that peft's save_pretrained wrote",
            ) from error
        upload = self._http.request(
            "POST",
            "/v1/adapters/upload",
            data={"name": name},
            files={
                "config": (ADAPTER_FILES[0], config),
                "weights": (ADAPTER_FILES[1], weights),
            },
        )
        return adapter_of(self._http.wait(upload))

    def save_adapter(self, name: str, folder: str | Path) -> Path:
        path = f"/v1/adapters/{quote(name, safe='')}/content"
        content = unpacked(self._http.wait(self._http.fetch(path)))
        with writing_adapter(folder) as target:
            for file, data in content.items():
                (target / file).write_bytes(data)
        return target

    def unload_adapter(self, name: str) -> None:
        self._http.wait(self._http.request("DELETE", f"/v1/adapters/{quote(name, safe='')}"))

    @property
    def fine_tuning(self) -> RemoteJobs:
        """The server's files and jobs, those that the key may see."""
        return RemoteJobs(self._http, self._info.name)

    def stats(self) -> dict[str, Any]:
        """The live snapshot, without the histograms (Prometheus has them at /metrics)."""
        return self._http.wait(self._http.request("GET", "/v1/live"))

    def close(self) -> None:
        """Cancels what runs and closes the connections; the server lives on."""
        self._http.close()

    # --- the work, on the transport's loop --------------------------------------------------

    async def _generate(self, prompt: Any, sampling: Sampling, progress: bool = False) -> Any:
        prompts, single = batch_of(prompt)
        bodies = [completion_body(self._info.name, one, sampling) for one in prompts]
        return await self._completions(COMPLETIONS, bodies, sampling, single, progress)

    async def _chat(
        self,
        messages: Any,
        tools: Sequence[Mapping[str, Any]] | None,
        tool_choice: str | Mapping[str, Any] | None,
        sampling: Sampling,
        progress: bool = False,
    ) -> Any:
        several, single = conversations_of(messages)
        name = self._info.name
        bodies = [chat_body(name, one, tools, tool_choice, sampling) for one in several]
        return await self._completions(CHAT, bodies, sampling, single, progress)

    async def _completions(
        self,
        path: str,
        bodies: list[JsonBody],
        sampling: Sampling,
        single: bool,
        progress: bool,
    ) -> Any:
        carried = await self._carried(sampling.get("interventions"), sampling.get("blobs"))
        bodies = [body | carried for body in bodies]
        answers = await self._http.post_all(path, bodies, progress=progress)
        made = []
        for answer in answers:
            completion = completion_of(answer, self._info.name)
            completion.program = await self._result(answer["choices"][0].get("program"))
            made.append(completion)
        return made[0] if single else made

    async def _score(
        self,
        text: Any,
        adapter: str | None,
        salt: str,
        top: int,
        interventions: ProgramLike = None,
        blobs: Blobs | None = None,
        progress: bool = False,
    ) -> Any:
        given, single = score_items_of(text)
        items = [_item(one) for one in given]
        shared: JsonBody = {"model": self._model(adapter), "top": top}
        shared |= await self._carried(interventions, blobs)
        answers = await self._in_parts("/v1/score", "items", items, shared, salt, progress)
        scores = []
        for answer in answers:
            score = score_of(answer)
            score.program = await self._result(answer.get("program"))
            scores.append(score)
        return scores[0] if single else scores

    async def _run(
        self,
        program: ProgramLike,
        prompt: Any,
        blobs: Blobs | None,
        params: Blobs | None,
        adapter: str | None,
        salt: str,
        progress: bool = False,
    ) -> Any:
        prompts, single = run_prompts_of(prompt)
        shared: JsonBody = {"model": self._model(adapter)}
        shared |= await self._program(program, blobs, params)
        if salt:
            shared["cache_salt"] = salt
        bodies = [shared | _run_prompt(one) for one in prompts]
        answers = await self._http.post_all("/v1/run", bodies, progress=progress)
        made = [await self._result(answer["data"][0]) for answer in answers]
        return made[0] if single else made

    async def _explain(
        self, program: ProgramLike, prompt: Any, blobs: Blobs | None
    ) -> dict[str, Any]:
        body = {"model": self._info.name} | await self._program(program, blobs, None)
        answer = await self._http.post("/v1/explain", body | _run_prompt(prompt))
        return cast(dict[str, Any], answer["explain"])

    async def _store_program(self, program: ProgramLike) -> str:
        body, tensors = program_body(program)
        if tensors:
            await self._upload(tensors, lasting=True)
        answer = await self._http.post("/v1/programs", {"program": body})
        return str(answer["id"])

    async def _carried(self, program: ProgramLike, blobs: Blobs | None) -> JsonBody:
        """What a generating or scoring request says of its program."""
        if program is None:
            return {} if not blobs else {"blobs": await self._ids(blobs, "blobs")}
        body = await self._program(program, blobs, None)
        body["interventions"] = body.pop("program")
        return body

    async def _program(
        self, program: ProgramLike, blobs: Blobs | None, params: Blobs | None
    ) -> JsonBody:
        """A program with its tensors sent ahead: their ids by the names in the program."""
        written, tensors = program_body(program)
        body: JsonBody = {"program": written}
        named = await self._ids({**tensors, **(blobs or {})}, "blobs")
        if named:
            body["blobs"] = named
        if params:
            body["params"] = await self._ids(params, "params")
        return body

    async def _ids(self, values: Blobs, field: str) -> dict[str, str]:
        """Ids of tensors by name; those that are not at the server are sent."""
        known = {n: v.removeprefix("blob:") for n, v in values.items() if isinstance(v, str)}
        arrays = {n: array_of(v, f"{field}.{n}") for n, v in values.items() if n not in known}
        return known | (await self._upload(arrays, lasting=False) if arrays else {})

    async def _upload(self, arrays: Mapping[str, Array], *, lasting: bool) -> dict[str, str]:
        answer = await self._http.request(
            "POST",
            BLOBS,
            params={"lasting": "true" if lasting else "false"},
            content=write_arrays(arrays),
            headers={"Content-Type": "application/octet-stream"},
        )
        return {one["name"]: one["id"] for one in answer["data"]}

    async def _result(self, body: JsonBody | None) -> ProgramResult | None:
        """A result from its JSON, with the numbers that are kept at the server."""
        if body is None:
            return None
        kept = body.get("pools") or {}
        arrays = await self._arrays(list(kept.values()))
        return result_of(body, {kind: arrays[name] for kind, name in kept.items()})

    async def _arrays(self, ids: list[str]) -> dict[str, Array]:
        found: dict[str, Array] = {}
        for at in range(0, len(ids), _BLOBS_AT_ONCE):
            names = quote(",".join(ids[at : at + _BLOBS_AT_ONCE]), safe=",:")
            found |= read_arrays(await self._http.fetch(f"{BLOBS}/{names}"))
        return found

    async def _embed(
        self,
        text: Any,
        pooling: str,
        normalize: bool,
        adapter: str | None,
        salt: str,
        progress: bool = False,
    ) -> Any:
        given, single = batch_of(text)
        inputs = [text_or_ids(one) for one in given]
        shared: JsonBody = {
            "model": self._model(adapter),
            "pooling": pooling,
            "normalize": normalize,
        }
        answers = await self._in_parts("/v1/embeddings", "input", inputs, shared, salt, progress)
        vectors = [answer["embedding"] for answer in answers]
        return vectors[0] if single else vectors

    async def _in_parts(
        self,
        path: str,
        name: str,
        items: list[Any],
        shared: JsonBody,
        salt: str,
        progress: bool,
    ) -> list[JsonBody]:
        """One request for every so many items; their answers in the items' order."""
        if salt:
            shared = shared | {"cache_salt": salt}
        starts = range(0, len(items), _ITEMS_AT_ONCE)
        bodies = [shared | {name: items[at : at + _ITEMS_AT_ONCE]} for at in starts]
        answers = await self._http.post_all(path, bodies, progress=progress)
        return [one for answer in answers for one in answer["data"]]

    def _deltas(
        self, path: str, body: JsonBody, sampling: Sampling
    ) -> Generator[Delta, None, None]:
        program, blobs = sampling.get("interventions"), sampling.get("blobs")
        if program is not None or blobs:
            body = body | self._http.wait(self._carried(program, blobs))
        with closing(self._http.stream(path, body)) as events:
            for item in events:
                delta = delta_of(item)
                if delta is not None:
                    found = item["choices"][0].get("program")
                    if found is not None:
                        delta.program = self._http.wait(self._result(found))
                    yield delta

    async def _adeltas(
        self, path: str, body: JsonBody, sampling: Sampling
    ) -> AsyncGenerator[Delta, None]:
        program, blobs = sampling.get("interventions"), sampling.get("blobs")
        if program is not None or blobs:
            body = body | await self._http.hop(self._carried(program, blobs))
        async with aclosing(self._http.astream(path, body)) as events:
            async for item in events:
                delta = delta_of(item)
                if delta is not None:
                    found = item["choices"][0].get("program")
                    if found is not None:
                        delta.program = await self._http.hop(self._result(found))
                    yield delta

    def _post(self, path: str, **body: Any) -> JsonBody:
        return self._http.wait(self._http.post(path, body))

    def _model(self, adapter: str | None) -> str:
        return self._info.name if adapter is None else f"{self._info.name}:{adapter}"


def _item(one: Any) -> JsonBody:
    if isinstance(one, tuple):
        return {"context": prompt_body(one[0]), "text": text_or_ids(one[1])}
    return {"text": prompt_body(one)}


def _run_prompt(prompt: Any) -> JsonBody:
    if is_conversation(prompt):
        return {"messages": [message_body(message) for message in prompt]}
    return {"prompt": prompt_body(prompt)}
