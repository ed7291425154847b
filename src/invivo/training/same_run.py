"""Whether a configuration may go on with a run that another one began."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from invivo.errors import Conflict
from invivo.training.typed_tables import flat

# What changes no number, or only its rounding; of the text its hash is compared.
_FREE = (
    "name",
    "evaluation.",
    "checkpoint.",
    "export.",
    "parallel.",
    "data.sources",
    "data.prepared",
    "train.micro_batch",
    "train.compile",
    "train.recompute",
    "train.log_every",
)
# How the model is trained, which a person may want to change on the way.
_STEERING = ("train.", "optimizer.", "schedule.")
_FRESH = "--fresh begins anew (the old run is set aside), or give the run another name"


def check_same_run(
    manifest: Mapping[str, Any], config: Mapping[str, Any], digest: str, *, may_change: bool
) -> dict[str, list[Any]]:
    """Compare with the run's manifest.

    Args:
        config: nested tables.
        digest: of the prepared data.
        may_change: how it is trained.

    Returns:
        What changed, as ``{field: [before, now]}``.

    Raises:
        Conflict: ``field`` is another than the run's, and must not or (without ``may_change``)
            shall not be.
    """
    old = flat(manifest["config"])
    new = flat(json.loads(json.dumps(config)))  # tuples become lists, as in the manifest
    changed: dict[str, list[Any]] = {}
    for name in dict.fromkeys((*old, *new)):
        # A setting that only one version of the program has is none that a user changed.
        known = (name in old and name in new) or name.startswith("model.")
        before, now = old.get(name), new.get(name)
        if not known or name.startswith(_FREE) or before == now:
            continue
        if not name.startswith(_STEERING):
            raise Conflict(
                f"the run has {before!r}, and cannot go on with another",
                field=name,
                given=now,
                remedy=_FRESH,
            )
        if not may_change:
            raise Conflict(
                f"the run has {before!r}",
                field=name,
                given=now,
                remedy=f"--resume goes on with the new value; {_FRESH}",
            )
        changed[name] = [before, now]
    if manifest["data"]["digest"] != digest:
        raise Conflict("the text is another than the run's", field="data.sources", remedy=_FRESH)
    return changed
