"""Whether an argument's tensor fits the rows that it meets."""

from __future__ import annotations

from collections.abc import Mapping

from invivo.edits.blobs import Blobs
from invivo.edits.program import Parameter
from invivo.edits.site_names import SiteRef, head_count, head_sizes
from invivo.edits.values import Blob, Param, Value
from invivo.errors import InvalidRequest
from invivo.models.config import ModelConfig


def touched_shape(
    config: ModelConfig, site: SiteRef, n_positions: int, n_keys: int
) -> tuple[int, ...]:
    """Shape of the selected part of a site: [positions, heads if it has them, numbers].

    States have keys and values for numbers. Switches (edges, moe.expert.on, blocks, inputs) have
    the positions alone.
    """
    if site.site == "moe.expert.weight":
        assert site.heads is not None
        return n_positions, len(site.heads)
    try:
        *inner, size = head_sizes(config, site.site, n_keys=n_keys)
    except KeyError:
        return (n_positions,)
    width = size if site.components is None else len(site.components)
    if head_count(config, site.site) is None:
        return n_positions, width
    assert site.heads is not None
    return n_positions, len(site.heads), *inner, width


def check_reference(
    blob: Blob, shape: tuple[int, ...], positions: str | None, path: str, blobs: Blobs
) -> None:
    """Check a tensor of which a mean is taken or rows are drawn.

    Args:
        shape: of the rows that change: [positions, heads if the site has them, numbers].
        positions: "each": it has a row for each of them, [n, positions, ...]; "all": any dimensions
            in front of the site's own; None: [n, ...].

    Raises:
        InvalidRequest: it is not of that shape.
    """
    given = tuple(blobs.get(blob.name, path).shape)
    own = shape if positions == "each" else shape[1:]
    n_front = len(given) - len(own)
    fits = n_front == 1 or (positions == "all" and n_front > 1)
    if not fits or any(
        mine not in (1, wanted) for mine, wanted in zip(given[n_front:], own, strict=True)
    ):
        raise InvalidRequest(
            f"the shape must fit {['n', *own]}, with n rows to choose from or to average",
            field=path,
            given=list(given),
        )


def check_value(
    value: Value,
    shape: tuple[int, ...],
    path: str,
    blobs: Blobs,
    params: Mapping[str, Parameter],
) -> None:
    """Raises InvalidRequest unless ``value`` can be broadcast to ``shape`` as torch does it."""
    match value:
        case Blob(name):
            given = tuple(blobs.get(name, path).shape)
        case Param(name):
            if name not in params:
                raise InvalidRequest(
                    "this parameter is not declared",
                    field=path,
                    given=name,
                    remedy=f"Declared: {', '.join(params) or 'none'}",
                )
            given = params[name].shape
        case tuple():
            first = value[0]
            given = (len(value), len(first)) if isinstance(first, tuple) else (len(value),)
        case _:
            return
    fits = len(given) <= len(shape) and all(
        mine in (1, wanted) for mine, wanted in zip(reversed(given), reversed(shape), strict=False)
    )
    if not fits:
        raise InvalidRequest(f"the shape must fit {list(shape)}", field=path, given=list(given))
