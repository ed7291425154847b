"""Jobs that train a program's parameters: their program, their texts, and what comes of them.

The tensors that a program names lie beside the job's checkpoints, so that the job can go on in
another process; what it has learned is kept among the owner's programs, in the place of the
parameters' start values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from invivo.edits.blobs import Blobs
from invivo.edits.program import Parameter, Program, parse_program
from invivo.engine.checkpoint import VALUES
from invivo.engine.job_spec import Text
from invivo.engine.trained_program import ProgramSpec
from invivo.errors import InvalidRequest, InvivoError
from invivo.jobs.data import TrainingData
from invivo.jobs.examples import Examples
from invivo.kernels.cross_entropy import IGNORED
from invivo.lm_jobs import Hyperparameters
from invivo.programs import GivenProgram, OwnedProgram, Programs

TENSORS = "tensors.safetensors"


def given_program(
    programs: Programs, asked: Hyperparameters, owner: str, folder: Path | None = None
) -> GivenProgram:
    """The program of a job with its tensors.

    Args:
        folder: of the job's checkpoints, where its tensors were put; None: they are looked up
            among the owner's.

    Raises:
        InvalidRequest, NotFound, TooLarge: it is no program, or a tensor is not there.
    """
    tensors: Mapping[str, object] = asked.blobs
    if folder is not None:
        tensors = _read(folder / TENSORS) if (folder / TENSORS).exists() else {}
    return programs.given(OwnedProgram(asked.program, owner), tensors)


def keep_tensors(given: GivenProgram, folder: Path) -> None:
    """Put the program's tensors beside the job's checkpoints.

    Raises:
        OSError: the disk is full or refuses.
    """
    tensors = {name: given.blobs.get(name, name).clone() for name in given.blobs.names()}
    if not tensors:
        return
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / f".{TENSORS}"
    try:
        save_file(tensors, draft)
        draft.replace(folder / TENSORS)  # whole or not at all
    except SafetensorError as error:  # the library's own word for a full disk
        raise OSError(str(error)) from error
    finally:
        draft.unlink(missing_ok=True)


def program_spec(given: GivenProgram, asked: Hyperparameters) -> ProgramSpec:
    """What the engine trains."""
    return ProgramSpec(given.program, asked.train, given.blobs, asked.sparsity, asked.objective)


class ProgramData(TrainingData):
    """Examples, each with the job's program resolved for it.

    What is learned counts as generated, what stands before it as the prompt; a text that is
    learned from its start is all prompt.
    """

    def __init__(
        self,
        examples: Examples,
        given: GivenProgram,
        programs: Programs,
        *,
        seed: int,
        shuffle: bool = True,
        n_texts: int | None = None,
    ) -> None:
        super().__init__(examples, seed=seed, shuffle=shuffle, n_texts=n_texts)
        self._runs = examples.runs
        self._others = examples.others
        self._given = given
        self._programs = programs

    def text(self, example: int) -> Text:
        text = super().text(example)
        first = next(i for i, label in enumerate(text.labels) if label != IGNORED)
        n_prompt = len(text.tokens) if first == 0 else first + 1
        runs = self._runs[example] if self._runs else {}
        resolved = self._programs.for_text(self._given, text.tokens, n_prompt, runs)
        return replace(text, resolved=resolved, others=self._compared(example, text.labels))

    def _compared(self, example: int, labels: Sequence[int]) -> list[int] | None:
        """The other token of every row with a label; None where the example has none."""
        others = self._others[example] if self._others else ()
        if not others:
            return None
        left = iter(others)
        return [label if label == IGNORED else next(left) for label in labels]

    def check(self) -> None:
        """
        Raises:
            InvalidRequest: the program means nothing for an example, whose number is told.
        """
        for example in range(len(self)):
            try:
                self.text(example)
            except InvivoError as error:
                raise InvalidRequest(
                    f"does not go with example {example + 1} of the data: {error}", field="program"
                ) from error


def keep_result(
    programs: Programs, given: GivenProgram, values: Mapping[str, torch.Tensor], owner: str
) -> str:
    """Store the program with trained values for its owner; its hash."""
    params = dict(given.program.params)
    for name, value in values.items():
        stored = programs.store_blob(value, owner)
        params[name] = Parameter(params[name].shape, f"blob:{stored}")
    for name in given.blobs.names():
        programs.store_blob(given.blobs.get(name, name), owner)
    program = _by_hash(replace(given.program, params=params), given.blobs)
    return programs.store(program, owner)


def result_of(folder: Path) -> dict[str, torch.Tensor]:
    """The trained values in a checkpoint's folder.

    Raises:
        InvalidRequest: they are not there, or cannot be read.
    """
    return _read(folder / VALUES)


def _read(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InvalidRequest(
            f"tensors of the job cannot be read: {error}", field="program", given=str(path)
        ) from error


def _by_hash(program: Program, blobs: Blobs) -> Program:
    """``program`` with its tensors named by their content, so that it stands by itself."""

    def renamed(value: object) -> object:
        if isinstance(value, str) and value.startswith("blob:"):
            name = value.removeprefix("blob:")
            found = dict(blobs.digest()).get(name)
            return value if found is None else f"blob:{found}"
        if isinstance(value, Mapping):
            return {key: renamed(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [renamed(inner) for inner in value]
        return value

    return parse_program(renamed(program.to_dict()))
