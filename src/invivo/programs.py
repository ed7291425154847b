"""Programs as the LM's users hand them in, made what the engine carries, and back.

One object a model: it keeps programs and tensors by the hash of their content, builds what
selectors look at, resolves (and remembers what it resolved), and turns what came back into numpy.
"""

from __future__ import annotations

import functools
import logging
import platform
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from invivo.content_store import ContentStore
from invivo.edits.blobs import Blobs, content_hash
from invivo.edits.explain import cost, explain
from invivo.edits.oracle import run_program
from invivo.edits.program import Program, parse_program
from invivo.edits.prompt_text import PromptText, prompt_of_ids
from invivo.edits.resolve import ResolveBounds, ResolveCache, resolve
from invivo.edits.resolved import ResolvedProgram, ResolvedRow
from invivo.edits.results import Captured, Measured, ProgramOutput, RowOutput
from invivo.edits.site_check import failed_sites
from invivo.edits.site_names import format_ref
from invivo.engine.types import Intervention
from invivo.errors import InvalidRequest, NotFound
from invivo.marked_prompt import MarkedPrompt
from invivo.models.load import LoadedModel
from invivo.passing_thread import in_passing_thread
from invivo.program_result import Capture, Measure, ProgramResult, Row

log = logging.getLogger(__name__)

_MIB = 1 << 20
_LARGEST_BLOB = 64 * _MIB
_IDENTITIES_KEPT = 64  # programs whose hash is remembered
_TEXTS_KEPT = 256  # prompts whose texts by token are remembered


@dataclass(frozen=True, slots=True)
class OwnedProgram:
    """A program as it was handed in, by one who sees only what is kept for ``owner``."""

    program: object
    owner: str


@dataclass(frozen=True, slots=True)
class GivenProgram:
    """A program with its tensors, for any prompt."""

    program: Program
    blobs: Blobs
    params: Mapping[str, torch.Tensor]
    owner: str = ""


class Programs:
    """Programs of one model's requests; every method may be called from any thread.

    Args:
        tokenize: token ids of a text; the flag asks for what opens a text.
        detokenize: text of token ids.
        capture_bytes: most that one request may bring back.
        folder: where programs and tensors are kept for the next process; None: in memory.
    """

    def __init__(
        self,
        model: LoadedModel,
        tokenize: Callable[[str, bool], list[int]],
        detokenize: Callable[[Sequence[int]], str],
        *,
        capture_bytes: int,
        folder: Path | None = None,
    ) -> None:
        self._model = model
        self._tokenize = tokenize
        self._detokenize = detokenize
        self._bounds = ResolveBounds(capture_bytes=capture_bytes)
        self._resolved = ResolveCache()
        self._identities: OrderedDict[int, tuple[Program, str, frozenset[str]]] = OrderedDict()
        self._texts: OrderedDict[tuple[int, ...], PromptText] = OrderedDict()
        self._lock = threading.Lock()
        self._checking = threading.Lock()
        self._failed: Mapping[tuple[str, int], str] | None = None
        self._programs = ContentStore(
            "program",
            owner_bytes=64 * _MIB,
            owner_items=65_536,
            total_bytes=512 * _MIB,
            folder=None if folder is None else folder / "programs",
        )
        self._blobs = ContentStore(
            "blob",
            owner_bytes=512 * _MIB,
            owner_items=65_536,
            total_bytes=2048 * _MIB,
            folder=None if folder is None else folder / "blobs",
        )

    def check_sites(self) -> Mapping[tuple[str, int], str]:
        """Try the equations between the model's sites, the first time this is called.

        On a CPU alone: on a GPU the interpreter's small batches have not been tried with it.

        Returns:
            The sites that programs are refused, and their layers, with the reason.
        """
        with self._checking:
            if self._failed is None:
                decoder = self._model.decoder
                on_cpu = decoder.embed.device.type == "cpu"
                self._failed = in_passing_thread(lambda: failed_sites(decoder)) if on_cpu else {}
                for (site, layer), reason in self._failed.items():
                    log.error("programs are refused %s of layer %d: %s", site, layer, reason)
            return self._failed

    # --- what is kept -----------------------------------------------------------------------
    def store(self, given: object, owner: str = "") -> str:
        """Keep a program (and the tensors that its builder holds) under its hash.

        Raises:
            InvalidRequest: it is no program.
            TooLarge: the owner keeps too many.
        """
        program, tensors = self.read(given, owner)
        for tensor in tensors.values():
            self.store_blob(tensor, owner)
        self._programs.put(owner, program.hash, program.to_json().encode())
        return program.hash

    def stored(self, name: str, owner: str = "", field: str = "program") -> Program:
        """Raises NotFound."""
        return parse_program(self._programs.get(owner, name, field))

    def stored_sizes(self, owner: str = "") -> dict[str, int]:
        """Bytes of the owner's programs by hash."""
        return self._programs.sizes(owner)

    def forget(self, name: str, owner: str = "") -> None:
        """Raises NotFound."""
        self._programs.delete(owner, name)

    def store_blob(self, value: object, owner: str = "", *, lasting: bool = True) -> str:
        """Keep a tensor under the hash of its content.

        Raises:
            InvalidRequest: it is no finite tensor.
            TooLarge: the owner keeps too much.
        """
        tensor = _tensor(value, "blob")
        if lasting:
            name = Blobs(budget=_LARGEST_BLOB).add("value", tensor)
        else:
            name = content_hash(tensor)
        self._blobs.put(owner, name, save_tensors({"value": tensor.contiguous()}), lasting=lasting)
        return name

    def blob(self, name: str, owner: str = "", field: str = "id") -> torch.Tensor:
        """Raises NotFound."""
        return load_tensors(self._blobs.get(owner, name, field))["value"]

    def blob_sizes(self, owner: str = "") -> dict[str, int]:
        """Bytes of the owner's tensors by hash."""
        return self._blobs.sizes(owner)

    def forget_blob(self, name: str, owner: str = "") -> None:
        """Raises NotFound."""
        self._blobs.delete(owner, name)

    # --- from what is handed in -------------------------------------------------------------
    def read(self, given: object, owner: str = "") -> tuple[Program, dict[str, torch.Tensor]]:
        """The program in any of its forms, and the tensors that come with it.

        Args:
            given: JSON data, JSON text, a Program, a Builder, or the hash of a stored program.

        Raises:
            InvalidRequest: it is none of these, or not a valid program.
            NotFound: no program of this hash is stored.
        """
        if isinstance(given, Program):
            return given, {}
        if isinstance(given, str) and given.startswith("sha256:"):
            return self.stored(given, owner), {}
        if isinstance(given, str | bytes | Mapping):
            return parse_program(given), {}
        build, blobs = getattr(given, "build", None), getattr(given, "blobs", None)
        if callable(build) and isinstance(blobs, Mapping):
            return build(), dict(blobs)
        raise InvalidRequest(
            "this is no program",
            field="program",
            given=type(given).__name__,
            remedy="Give JSON data, a Program, what the builder gives, or the hash of a stored one",
        )

    def given(
        self,
        program: object,
        blobs: Mapping[str, object] | None = None,
        params: Mapping[str, object] | None = None,
    ) -> GivenProgram:
        """A program with its tensors, read and checked as far as that needs no prompt.

        Args:
            program: as for :meth:`read`, or an :class:`OwnedProgram`.
            blobs: tensors (arrays, lists, or ids of stored ones) by the names in the program.
            params: values of trainable parameters.

        Raises:
            InvalidRequest, TooLarge: it is no program, or a tensor does not fit.
            NotFound: a stored program or tensor is not there.
        """
        self.check_sites()
        owned = program if isinstance(program, OwnedProgram) else OwnedProgram(program, "")
        owner = owned.owner
        read, tensors = self.read(owned.program, owner)
        found = self._blobs_of(read, tensors, blobs or {}, owner)
        return GivenProgram(read, found, self._parameters(read, params or {}, owner), owner)

    def intervention(
        self, given: GivenProgram | None, prompt: MarkedPrompt, *, n_new: int = 0
    ) -> Intervention | None:
        """What the engine carries with a request; None where nothing is to be done.

        Args:
            given: None: the prompt's sets alone.
            n_new: how many tokens may be generated.

        Raises:
            InvalidRequest, TooLarge: whatever is wrong with the program for this prompt.
        """
        if given is None:
            given = GivenProgram(Program(), Blobs(), {})
            if not any(len(ranges) > 1 for ranges in prompt.sets):
                return None
        program = _with_sets(given.program, prompt)
        resolved = self._resolve(program, prompt, given.blobs, n_new)
        return Intervention(resolved, given.blobs, given.params, given.owner)

    def for_text(
        self,
        given: GivenProgram,
        ids: Sequence[int],
        n_prompt: int,
        runs: Mapping[str, Sequence[int]],
    ) -> ResolvedProgram:
        """A program for a text of which all tokens are known.

        Args:
            n_prompt: how many of them are the prompt; the others count as generated.
            runs: prompts of the program's other runs, where the text has its own.

        Raises:
            InvalidRequest, TooLarge: whatever is wrong with the program for this text.
        """
        program = given.program
        for name in runs:
            if name not in program.runs or program.runs[name].prompt is None:
                raise InvalidRequest(
                    "the program has no run of this name with a prompt of its own",
                    field=f"runs.{name}",
                )
        own = {name: replace(program.runs[name], prompt=tuple(ids)) for name, ids in runs.items()}
        program = replace(program, runs={**program.runs, **own})
        return self._resolve(
            program, MarkedPrompt(tuple(ids[:n_prompt])), given.blobs, 0, tuple(ids[n_prompt:])
        )

    def n_tokens(self, intervention: Intervention) -> int:
        """Tokens that go through the whole model in all passes, nothing shared."""
        whole = cost(intervention.resolved)["token_layers"]
        return -(-whole // self._model.config.n_layers)

    def explain(self, intervention: Intervention) -> dict[str, Any]:
        """What would be done, as JSON-able data."""
        return explain(intervention.resolved)

    def _blobs_of(
        self,
        program: Program,
        built: Mapping[str, torch.Tensor],
        given: Mapping[str, object],
        owner: str,
    ) -> Blobs:
        blobs = Blobs()
        if not isinstance(given, Mapping):
            raise InvalidRequest("tensors by name are needed", field="blobs", given=given)
        for name, tensor in built.items():
            blobs.add(name, tensor)
        for name, value in given.items():
            if isinstance(value, str):
                value = self.blob(value.removeprefix("blob:"), owner, f"blobs.{name}")
            blobs.add(name, _tensor(value, f"blobs.{name}"))
        for name in sorted(_named_blobs(program.to_dict())):
            if name.startswith("sha256:") and not blobs.hashes([name]):
                try:
                    blobs.add(name, self.blob(name, owner))
                except NotFound:
                    continue  # resolving tells where in the program it is wanted
        return blobs

    def _parameters(
        self, program: Program, given: Mapping[str, object], owner: str
    ) -> dict[str, torch.Tensor]:
        found = {}
        for name, value in given.items():
            field = f"params.{name}"
            declared = program.params.get(name)
            if declared is None:
                raise InvalidRequest(
                    "the program declares no such parameter",
                    field=field,
                    remedy=f"Declared: {', '.join(program.params) or 'none'}",
                )
            if isinstance(value, str):
                value = self.blob(value.removeprefix("blob:"), owner, field)
            tensor = _tensor(value, field)
            if tuple(tensor.shape) != declared.shape:
                raise InvalidRequest(
                    f"the declared shape is {list(declared.shape)}",
                    field=field,
                    given=list(tensor.shape),
                )
            if not bool(torch.isfinite(tensor).all()):
                raise InvalidRequest("the tensor has NaN or infinite numbers", field=field)
            weight = self._model.decoder.embed
            found[name] = tensor.to(device=weight.device, dtype=weight.dtype)
        return found

    def _resolve(
        self,
        program: Program,
        prompt: MarkedPrompt,
        blobs: Blobs,
        n_new: int,
        following: tuple[int, ...] = (),
    ) -> ResolvedProgram:
        """``following``: tokens behind the prompt that are known already."""
        digest, names = self._identity(program)
        asked = (prompt.ids, prompt.sets, prompt.turns, prompt.n_past, n_new, following)
        key = (digest, *asked, blobs.hashes(names))

        def make() -> ResolvedProgram:
            text = self._text_of(prompt, n_new)
            prompts = {"main": self._continued(text, following) if following else text}
            for name, run in program.runs.items():
                if run.prompt is not None:
                    ids = (
                        tuple(self._tokenize(run.prompt, True))
                        if isinstance(run.prompt, str)
                        else run.prompt
                    )
                    self._check_ids(ids, f"runs.{name}.prompt")
                    prompts[name] = self._text_of(MarkedPrompt(ids), 0)
            return resolve(
                program,
                self._model.config,
                prompts,
                blobs=blobs,
                encode=lambda text: self._tokenize(text, False),
                model_names=(self._model.name, self._model.fingerprint),
                bounds=self._bounds,
                failed=self._failed or {},
            )

        with self._lock:
            known = self._resolved.peek(key)
        if known is not None:
            return known
        made = make()  # outside the lock: a large sweep takes a while
        with self._lock:
            return self._resolved.get(key, lambda: made)

    def _continued(self, text: PromptText, following: tuple[int, ...]) -> PromptText:
        """``text`` with known tokens behind it; no selector looks at their texts."""
        end = len(text.text)
        return replace(
            text,
            ids=text.ids + following,
            texts=text.texts + tuple(self._detokenize([token]) for token in following),
            offsets=text.offsets + ((end, end),) * len(following),
            n_new=len(following),
        )

    def _identity(self, program: Program) -> tuple[str, frozenset[str]]:
        """The hash of a program and the blobs that it names; of the last ones it is known."""
        with self._lock:
            found = self._identities.get(id(program))
        if found is None:
            names = frozenset(_named_blobs(program.to_dict()))
            found = (program, program.hash, names)  # which keeps the program, and so its id
            with self._lock:
                self._identities[id(program)] = found
                if len(self._identities) > _IDENTITIES_KEPT:
                    self._identities.popitem(last=False)
        return found[1], found[2]

    def _check_ids(self, ids: Sequence[int], field: str) -> None:
        most = self._model.config.vocab_size
        wrong = next((i for i in ids if i >= most), None)
        if wrong is not None or not ids:
            raise InvalidRequest(f"token ids from 0 to {most - 1}", field=field, given=wrong)

    def _text_of(self, prompt: MarkedPrompt, n_new: int) -> PromptText:
        """The prompt's tokens with their texts, turns and sets."""
        with self._lock:
            found = self._texts.get(prompt.ids)
        if found is None:
            found = prompt_of_ids(prompt.ids, self._detokenize)
            with self._lock:
                self._texts[prompt.ids] = found
                if len(self._texts) > _TEXTS_KEPT:
                    self._texts.popitem(last=False)
        turns = prompt.turns if prompt.text == found.text else ()
        return replace(
            found,
            n_new=n_new,
            n_past=found.n_past if prompt.n_past is None else prompt.n_past,
            turns=tuple((role, *_tokens_over(found, a, b)) for role, a, b in turns),
            groups={f"set{i}": ranges for i, ranges in enumerate(prompt.sets)},
        )

    @torch.no_grad()
    def interpret(self, intervention: Intervention) -> ProgramOutput:
        """Carry a program out on the interpreter, in the caller's thread."""
        rows = run_program(
            self._model.decoder,
            intervention.resolved,
            blobs=intervention.blobs,
            params=intervention.params,
        )
        return ProgramOutput([RowOutput(row.row, row.captures, row.measures) for row in rows])

    # --- what came back ---------------------------------------------------------------------
    def result(
        self,
        output: ProgramOutput,
        intervention: Intervention,
        generated: Sequence[int] = (),
    ) -> ProgramResult:
        """What the engine brought back, as users see it.

        Args:
            generated: the tokens that the run "main" has written.
        """
        resolved = intervention.resolved
        rows = []
        for row in output.rows:
            rows.append(
                Row(
                    binding=dict(row.row.binding),
                    captures=[
                        self._capture(c, row.row, generated, intervention.owner)
                        for c in row.captures
                    ],
                    measures=[self._measure(m, row.row, generated) for m in row.measures],
                )
            )
        weight = self._model.decoder.embed
        meta = {
            "program": resolved.hash,
            "model": self._model.name,
            "fingerprint": self._model.fingerprint,
            "dtype": str(weight.dtype).removeprefix("torch."),
            "device": weight.device.type,
            "kernel": "triton" if weight.device.type == "cuda" else "torch",
            "numerics": resolved.program.numerics,
            "versions": dict(_versions()),
        }
        return ProgramResult(rows, explain(resolved), meta)

    def _capture(
        self, captured: Captured, row: ResolvedRow, generated: Sequence[int], owner: str
    ) -> Capture:
        ref = captured.ref
        text = row.runs[ref.run].prompt
        here = generated if ref.run == "main" else ()
        positions = ref.positions.below(text.n_prompt + len(here))
        if ref.reduce != "mean":
            positions = positions[: captured.value.shape[0]]
        ids = None if captured.tokens is None else captured.tokens.cpu().numpy()
        return Capture(
            name=ref.name,
            run=ref.run,
            site=format_ref(ref.ref),
            layer=ref.ref.layer,
            heads=None if ref.ref.heads is None else list(ref.ref.heads),
            reduce=ref.reduce,
            positions=positions,
            tokens=self._texts_at(text, positions, here),
            values=as_array(captured.value),
            ids=ids,
            words=None if ids is None else self._words(ids),
            blob=self.store_blob(captured.value, owner, lasting=False)
            if ref.keep and captured.value.numel()
            else None,
        )

    def _measure(self, measured: Measured, row: ResolvedRow, generated: Sequence[int]) -> Measure:
        ref = measured.ref
        text = row.runs[ref.run].prompt
        here = generated if ref.run == "main" else ()
        positions = ref.positions.below(text.n_prompt + len(here))[: len(measured.values)]
        return Measure(
            name=ref.name,
            kind=ref.kind,
            run=ref.run,
            positions=positions,
            tokens=self._texts_at(text, positions, here),
            values=as_array(measured.values).astype(np.float64),
        )

    def _texts_at(
        self, text: PromptText, positions: Sequence[int], generated: Sequence[int]
    ) -> list[str]:
        n = text.n_prompt
        return [text.texts[i] if i < n else self._detokenize([generated[i - n]]) for i in positions]

    def _words(self, ids: np.ndarray[Any, np.dtype[Any]]) -> np.ndarray[Any, np.dtype[Any]]:
        """The text of each token, an array of the same shape."""
        unique, places = np.unique(ids, return_inverse=True)
        texts = np.array([self._detokenize([int(i)]) for i in unique], dtype=object)
        return texts[places].reshape(ids.shape)


def _with_sets(program: Program, prompt: MarkedPrompt) -> Program:
    """``program`` with the prompt's sets laid out side by side."""
    steps = [
        {
            "at": "input.mask",
            "do": "parallel",
            "blocks": [{"group": f"set{i}", "nth": k} for k in range(len(ranges))],
        }
        for i, ranges in enumerate(prompt.sets)
        if len(ranges) > 1
    ]
    if not steps:
        return program
    return replace(program, steps=program.steps + parse_program({"steps": steps}).steps)


def _named_blobs(data: object) -> set[str]:
    """The names behind "blob:" in a program's JSON form."""
    names, stack = set(), [data]
    while stack:
        value = stack.pop()
        if isinstance(value, str):
            if value.startswith("blob:"):
                names.add(value.removeprefix("blob:"))
        elif isinstance(value, Mapping):
            stack += value.values()
        elif isinstance(value, list | tuple):
            stack += value
    return names


def _tokens_over(text: PromptText, start: int, end: int) -> tuple[int, int]:
    """The range of tokens whose characters meet [start, end)."""
    inside = [i for i, (a, b) in enumerate(text.offsets) if a < end and b > start]
    return (inside[0], inside[-1] + 1) if inside else (0, 0)


def _tensor(value: object, field: str) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value
    try:
        return torch.as_tensor(value, dtype=None if hasattr(value, "dtype") else torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidRequest(
            "a tensor, an array or nested lists of numbers are needed",
            field=field,
            given=type(value).__name__,
        ) from error


def as_array(tensor: torch.Tensor) -> np.ndarray[Any, np.dtype[Any]]:
    """On the host; numpy has no bfloat16."""
    tensor = tensor.detach().cpu()
    return tensor.float().numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def read_tensors(data: bytes, field: str) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file.

    Raises:
        InvalidRequest: it is none, or is empty.
    """
    try:
        found = load_tensors(data)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise InvalidRequest(
            f"not a safetensors file: {error}",
            field=field,
            remedy="Write it with safetensors.torch.save or safetensors.numpy.save",
        ) from error
    if not found:
        raise InvalidRequest("the file holds no tensor", field=field)
    return found


@functools.cache
def _versions() -> dict[str, str]:
    import transformers

    try:
        own = metadata.version("invivo")
    except metadata.PackageNotFoundError:  # run from its source
        own = "source"
    return {
        "invivo": own,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
