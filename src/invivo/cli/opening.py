"""Getting hold of a language model for a command: in this process, or at a URL."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from invivo.cli.options import DEFAULT_MODEL
from invivo.cli.output import stderr
from invivo.errors import InvalidRequest

if TYPE_CHECKING:
    from invivo.lm import LM


@contextmanager
def opened(
    model: str | None,
    *,
    url: str | None = None,
    key: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    adapters: dict[str, str] | None = None,
    **engine_options: Any,
) -> Iterator[LM]:
    """An LM for the length of a ``with`` block.

    Raises:
        InvalidRequest: ``--url`` together with options of a model loaded here.
    """
    import invivo

    if url is not None:
        for name, value in (("--device", device), ("--dtype", dtype), ("--adapter", adapters)):
            if value:
                raise InvalidRequest(
                    "belongs to a model loaded here and cannot go with --url",
                    field=name,
                    given=value,
                    remedy="Leave one of the two out",
                )
        lm: LM = invivo.connect(url, key=key)
    else:
        # Loading bars and advice of the libraries underneath would stand in the answer's way.
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        name = model or DEFAULT_MODEL
        with stderr().status(f"loading {name}"):
            lm = invivo.load(
                name, device=device, dtype=dtype, adapters=adapters or None, **engine_options
            )
    try:
        yield lm
    finally:
        lm.close()
