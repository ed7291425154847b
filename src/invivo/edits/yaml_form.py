"""Programs as YAML: the same keys as the JSON form, easier to write by hand."""

from __future__ import annotations

from invivo.edits.program import DEFAULT_BOUNDS, Bounds, Program, parse_program
from invivo.errors import InvalidRequest, MissingDependency, TooLarge


def read_yaml(text: str, *, bounds: Bounds = DEFAULT_BOUNDS) -> Program:
    """Read a program from YAML.

    Raises:
        MissingDependency: PyYAML is not installed.
        InvalidRequest: it is no YAML, uses anchors, or is no program.
        TooLarge: it exceeds ``bounds``.
    """
    try:
        import yaml
    except ImportError:
        raise MissingDependency(
            "reading YAML needs PyYAML", remedy="pip install pyyaml, or write JSON"
        ) from None
    if len(text) > bounds.n_bytes:
        raise TooLarge(f"a program has at most {bounds.n_bytes} bytes", field="program")
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):  # a few lines of them can mean gigabytes
                raise InvalidRequest("anchors and aliases cannot be used", field="program")
        data = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise InvalidRequest(f"this is no YAML: {error}", field="program") from None
    return parse_program(data, bounds=bounds)


def to_yaml(program: Program) -> str:
    """The program as YAML, in the order in which one reads it."""
    try:
        import yaml
    except ImportError:
        raise MissingDependency(
            "writing YAML needs PyYAML", remedy="pip install pyyaml, or write JSON"
        ) from None
    return str(
        yaml.safe_dump(
            program.to_dict(), sort_keys=False, default_flow_style=None, allow_unicode=True
        )
    )
