"""Jobs that learn an adapter further: what it is, and where its numbers lie until they are needed.

A job begins with the version that is served when it is created. That is written beside the job's
checkpoints, so that it begins there in whatever process it is first carried out.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from invivo.engine.adapter_file import read_adapter, write_adapter
from invivo.engine.adapters import AdapterStore
from invivo.engine.bypasses import BypassSpec, Parameters
from invivo.engine.peft_format import from_peft
from invivo.errors import InvalidRequest, NotFound
from invivo.lm_jobs import SIZED, Hyperparameters
from invivo.models.config import ModelConfig

START = "start"  # folder beside the checkpoints
SAID_BY_ADAPTER = ("method", "on", "r", "layers", "alpha", "rank_stabilized", "activation")


@dataclass(frozen=True, slots=True)
class Start:
    """What is trained, and the values it begins with."""

    specs: tuple[BypassSpec, ...]
    parameters: Parameters

    def shown(self, config: ModelConfig) -> dict[str, Any]:
        """The hyperparameters that the adapter says. Of several bypasses: the kind of the first,
        all places and layers, the largest size."""
        first = self.specs[0]
        layers = {layer for spec in self.specs for layer in spec.layers or ()}
        every = first.kind == "soft_prompt" or len(layers) == config.n_layers
        size = max(spec.size for spec in self.specs)
        return {
            "method": first.kind,
            "on": list(dict.fromkeys(place for spec in self.specs for place in spec.on)),
            "r": size if first.kind in SIZED else None,
            "layers": None if every else sorted(layers),
            "alpha": first.alpha,
            "rank_stabilized": first.rank_stabilized,
            "activation": first.activation,
        }


def start_of(adapters: AdapterStore, asked: Hyperparameters) -> Start:
    """The adapter that ``asked.start`` names, as it is served now.

    Raises:
        NotFound: no such adapter is loaded.
        InvalidRequest: something is asked for that the adapter says.
    """
    usual = {field.name: field.default for field in fields(Hyperparameters)}
    for name in SAID_BY_ADAPTER:
        if getattr(asked, name) != usual[name]:
            raise InvalidRequest(
                "is as in the adapter that training begins with",
                field=name,
                given=getattr(asked, name),
                remedy="Leave it out, or leave start out",
            )
    assert asked.start is not None
    try:
        return Start(*adapters.content(asked.start))
    except NotFound as error:
        error.field = "start"
        raise


def keep_start(start: Start, folder: Path, config: ModelConfig, base_name: str) -> None:
    """Put it beside the job's checkpoints, whole or not at all.

    Raises:
        OSError: the disk is full or refuses.
        InvalidRequest: the peft library's format cannot hold it.
    """
    from safetensors import SafetensorError

    draft = folder / f".{START}"
    try:
        write_adapter(draft, start.specs, start.parameters, config, base_name)
        draft.rename(folder / START)
    except SafetensorError as error:  # the library's own word for a full disk
        raise OSError(str(error)) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def kept_start(folder: Path, config: ModelConfig) -> Start:
    """What :func:`keep_start` has put there.

    Raises:
        NotFound, InvalidRequest: it is not there any more, or cannot be read.
    """
    return Start(*from_peft(*read_adapter(folder / START), config))
