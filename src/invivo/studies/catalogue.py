"""All studies."""

from __future__ import annotations

from typing import Any

from invivo.errors import NotFound
from invivo.studies import s35_set_based_prompting
from invivo.studies.study import Study

STUDIES: tuple[Study[Any], ...] = (s35_set_based_prompting.STUDY,)


def study_named(name: str) -> Study[Any]:
    """
    Raises:
        NotFound: there is none of this name.
    """
    for study in STUDIES:
        if study.name == name:
            return study
    raise NotFound(
        "there is no such study",
        field="study",
        given=name,
        remedy=f"There are: {', '.join(study.name for study in STUDIES)}",
    )
