"""Values of the trainable parameters that a program declares."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from invivo.edits.blobs import Blobs
from invivo.edits.resolved import ResolvedProgram
from invivo.errors import InvalidRequest


def parameter_values(
    resolved: ResolvedProgram,
    blobs: Blobs,
    like: torch.Tensor,
    given: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """The program's parameters: those ``given``, and the start values of all others.

    Raises:
        InvalidRequest: one has another shape than the program declares.
    """
    found = {}
    for name, parameter in resolved.program.params.items():
        field_name = f"params.{name}"
        if name in given:
            found[name] = given[name]
        elif isinstance(parameter.init, str):
            found[name] = blobs.get(parameter.init.removeprefix("blob:"), field_name).to(like)
        else:
            found[name] = torch.full(
                parameter.shape, parameter.init, dtype=like.dtype, device=like.device
            )
        if tuple(found[name].shape) != parameter.shape:
            raise InvalidRequest(
                f"the declared shape is {list(parameter.shape)}",
                field=field_name,
                given=list(found[name].shape),
            )
    return found
