"""``invivo look``: the inside of a model at a prompt, as a table and a figure."""

from __future__ import annotations

import math
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from invivo.cli import options, programs
from invivo.cli.output import examples, note, print_json, print_table, stdout
from invivo.errors import InvalidRequest

if TYPE_CHECKING:
    from invivo.instruments.attention_pattern import AttentionPattern
    from invivo.instruments.direct_attribution import DirectAttribution
    from invivo.instruments.logit_lens import LogitLens
    from invivo.lm import LM
    from invivo.program_result import ProgramResult

EXAMPLES = examples(
    "invivo look 'The capital of Poland is'            logit lens by layer and token",
    "invivo look 'The capital of Poland is' --attribution --figure heads.png",
    "invivo look 'The capital of Poland is' --attention --at layers.9.attn.head.3",
    "invivo look 'The cat sat' --at 'layers.3.mlp.out@last=zero'    the lens under an edit",
    "invivo look 'The cat sat' --at '@last?prob(\" on\")'            a program of one's own",
    "invivo look 'The cat sat' --program patch.yaml --json",
)

_MOST_COLUMNS = 12  # tokens side by side
_WIDEST = 9  # characters of a word in a cell
VIEW = "What to look at"


class View(Enum):
    LENS = "lens"
    ATTRIBUTION = "attribution"
    ATTENTION = "attention"
    PROGRAM = "program"


def look(
    prompt: Annotated[str, typer.Argument(help="The text to look into.")],
    lens: Annotated[
        bool,
        typer.Option(
            "--lens",
            help="What every layer would answer (the default).",
            rich_help_panel=VIEW,
        ),
    ] = False,
    attribution: Annotated[
        bool,
        typer.Option(
            "--attribution",
            help="What every head and feed-forward adds to a token's logit.",
            rich_help_panel=VIEW,
        ),
    ] = False,
    attention: Annotated[
        bool,
        typer.Option(
            "--attention",
            help="Where heads look; with --at layers.L.attn.head.H the whole pattern of one.",
            rich_help_panel=VIEW,
        ),
    ] = False,
    token: Annotated[
        str | None,
        typer.Option(
            "--token",
            help="Attribute this token's logit; the likeliest if not given.",
            rich_help_panel=VIEW,
        ),
    ] = None,
    minus: Annotated[
        str | None,
        typer.Option(
            "--minus", help="Attribute the difference to this token.", rich_help_panel=VIEW
        ),
    ] = None,
    top: Annotated[
        int,
        typer.Option(
            "--top",
            min=1,
            max=100,
            help="Tokens of the lens; of the largest shares twice as many.",
            rich_help_panel=VIEW,
        ),
    ] = 5,
    at: programs.At = None,
    program: programs.File = None,
    run: programs.Runs = None,
    blob: programs.Blobs = None,
    chat: programs.Chat = False,
    figure: Annotated[
        Path | None,
        typer.Option("--figure", help="Also draw it: .png, .svg or .pdf."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The numbers as JSON.")] = False,
    model: options.Model = None,
    url: options.Url = None,
    key: options.Key = None,
    adapter: options.Adapters = None,
    use: Annotated[str | None, typer.Option("--use", help="Adapter to look into.")] = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
) -> None:
    """Look inside a model at a prompt.

    Edits in --at or --program are in place while it is looked at; a program with outputs of its
    own is run as it is.
    """
    from invivo.cli.opening import opened

    sites, words = programs.split_words(at)
    body = programs.read_program(program, words, run)
    view = _view(lens, attribution, attention, bool(body.get("out")))
    if figure is not None:
        from invivo.cli.look_figure import check_figure

        check_figure(figure, view is View.PROGRAM)
    if len(sites) > 1 or (sites and view in (View.ATTRIBUTION, View.PROGRAM)):
        raise InvalidRequest(
            "one site is read by --lens and --attention, none by what else there is",
            field="--at",
            given=sites[-1],
            remedy="Write it as an output, SITE@last?norm",
        )
    blobs = programs.read_blobs(blob) or None
    asked = programs.asked(prompt, chat)
    shared: dict[str, Any] = {"edits": body or None, "blobs": blobs, "adapter": use}
    paths = options.adapter_paths(adapter)
    with opened(model, url=url, key=key, device=device, dtype=dtype, adapters=paths) as lm:
        if view is View.LENS:
            _lens(lm, asked, sites, top, shared, as_json, figure)
        elif view is View.ATTRIBUTION:
            _attribution(lm, asked, token, minus, top, shared, as_json, figure)
        elif view is View.ATTENTION:
            _attention(lm, asked, sites, shared, as_json, figure)
        else:
            result: ProgramResult = lm.run(body, asked, blobs=blobs, adapter=use)
            print_json(result.to_dict()) if as_json else show_result(result)


def _view(lens: bool, attribution: bool, attention: bool, own_outputs: bool) -> View:
    chosen = [
        view
        for view, wanted in (
            (View.LENS, lens),
            (View.ATTRIBUTION, attribution),
            (View.ATTENTION, attention),
        )
        if wanted
    ]
    if len(chosen) > 1:
        raise InvalidRequest(
            f"cannot go together with --{chosen[1].value}", field=f"--{chosen[0].value}"
        )
    if chosen:
        return chosen[0]
    return View.PROGRAM if own_outputs else View.LENS


def _lens(
    lm: LM,
    prompt: Any,
    sites: list[str],
    top: int,
    shared: dict[str, Any],
    as_json: bool,
    figure: Path | None,
) -> None:
    from invivo.instruments.logit_lens import logit_lens

    site = sites[0] if sites else "layers.*.resid.post"
    found = logit_lens(lm, prompt, at=site, top=top, **shared)
    print_json(found.to_dict()) if as_json else show_lens(found)
    if figure is not None:
        from invivo.cli.look_figure import draw_lens

        draw_lens(found, figure)


def _attribution(
    lm: LM,
    prompt: Any,
    token: str | None,
    minus: str | None,
    top: int,
    shared: dict[str, Any],
    as_json: bool,
    figure: Path | None,
) -> None:
    from invivo.instruments.direct_attribution import direct_attribution

    found = direct_attribution(lm, prompt, token=token, minus=minus, **shared)
    print_json(found.to_dict()) if as_json else show_attribution(found, top)
    if figure is not None:
        from invivo.cli.look_figure import draw_attribution

        draw_attribution(found, figure)


def _attention(
    lm: LM,
    prompt: Any,
    sites: list[str],
    shared: dict[str, Any],
    as_json: bool,
    figure: Path | None,
) -> None:
    from invivo.instruments.attention_pattern import attention_pattern

    if sites:
        site = sites[0] if sites[0].endswith(".prob") else f"{sites[0]}.prob"
        found = attention_pattern(lm, prompt, at=site, pos="@prompt", **shared)
    else:
        found = attention_pattern(lm, prompt, **shared)
    if as_json:
        print_json(found.to_dict())
    elif found.probs.shape[:2] == (1, 1):
        show_pattern(found)
    else:
        show_heads(found)
    if figure is not None:
        from invivo.cli.look_figure import draw_attention

        draw_attention(found, figure)


def show_lens(found: LogitLens) -> None:
    """Layers down, tokens across: the likeliest word, the brighter the likelier."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    n = len(found.positions)
    shown = range(max(0, n - _MOST_COLUMNS), n)
    if len(shown) < n:
        note(f"the last {len(shown)} of {n} tokens; --json has all")
    _headline("what each layer would answer")
    table = Table(box=SIMPLE_HEAD, padding=(0, 1))
    table.add_column("layer", justify="right")
    for i in shown:
        table.add_column(Text(visible(found.tokens[i])), no_wrap=True)
    for row in reversed(range(len(found.sites))):
        layer = found.layers[row]
        cells = [Text(str(layer) if layer >= 0 else found.sites[row])]
        for i in shown:
            p = math.exp(found.logprobs[row, i, 0])
            cells.append(Text(visible(str(found.words[row, i, 0])), style=shade(p)))
        table.add_row(*cells)
    stdout().print(table)
    last = found.logprobs[-1, -1]
    rows = [
        [visible(str(word), 40), f"{100 * math.exp(x):.2f} %", f"{x:.3f}"]
        for word, x in zip(found.words[-1, -1], last, strict=True)
    ]
    _headline(f"at {found.sites[-1]}, after {visible(found.tokens[-1], 40)}")
    print_table("", ["next", "probability>", "log-probability>"], rows)


def show_attribution(found: DirectAttribution, top: int) -> None:
    """The largest shares, and the sums."""
    against = "" if found.minus_word is None else f" minus {visible(found.minus_word, 40)}"
    _headline(f"logit of {visible(found.word, 40)}{against} after {visible(found.at, 40)}")
    rows = [[name, f"{share:+.4f}"] for name, share in found.largest(2 * top)]
    print_table("", ["largest shares", "share>"], rows)
    sums = [
        ("embedding", found.embed),
        ("attention", float(found.attn.sum())),
        ("feed-forward", float(found.mlp.sum())),
        ("bias of the final norm", found.constant),
        ("logit", found.logit),
    ]
    told = [[name, f"{x:+.4f}"] for name, x in sums if abs(x) >= 5e-5 or name == "logit"]
    print_table("", ["sum", "share>"], told)


def show_heads(found: AttentionPattern) -> None:
    """For each head the key that the last query looks at most."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    shown = found.heads[:_MOST_COLUMNS]
    if len(shown) < len(found.heads):
        note(f"{len(shown)} of {len(found.heads)} heads; --json has all")
    _headline(f"where {visible(found.queries[-1], 40)} looks most")
    table = Table(box=SIMPLE_HEAD, padding=(0, 1))
    table.add_column("layer", justify="right")
    for head in shown:
        table.add_column(f"head {head}", no_wrap=True)
    for i in reversed(range(len(found.layers))):
        cells = [Text(str(found.layers[i]))]
        for h in range(len(shown)):
            probs = found.probs[i, h, -1]
            best = int(probs.argmax())
            cells.append(Text(visible(found.keys[best]), style=shade(float(probs[best]))))
        table.add_row(*cells)
    stdout().print(table)


def show_pattern(found: AttentionPattern) -> None:
    """Queries down, keys across, in per cent."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    n = len(found.keys)
    first = max(0, n - _MOST_COLUMNS)
    if first:
        note(f"the last {n - first} of {n} keys; --json has all")
    _headline(f"layer {found.layers[0]}, head {found.heads[0]}: attention in %")
    table = Table(box=SIMPLE_HEAD, padding=(0, 1))
    table.add_column("query")
    for text in found.keys[first:]:
        table.add_column(Text(visible(text)), justify="right", no_wrap=True)
    for q, position in enumerate(found.positions):
        cells = [Text(visible(found.queries[q]))]
        for k in range(first, n):
            p = float(found.probs[0, 0, q, k])
            cells.append(Text(f"{100 * p:.0f}" if k <= position else "", style=shade(p)))
        table.add_row(*cells)
    stdout().print(table)


def show_result(result: ProgramResult) -> None:
    """Measures and single numbers as one table, other captures by their shapes."""
    records = result.table()
    columns = list(dict.fromkeys(name for record in records for name in record))
    if columns:
        rows = [[_cell(record.get(name)) for name in columns] for record in records]
        print_table("", [f"{name}>" for name in columns], rows)
    large = [c for c in result.captures if c.values.size != 1]
    for capture in large:
        shape = " x ".join(map(str, capture.values.shape))
        stdout().print(f"{capture.name}: {capture.site} [{shape}]", markup=False, soft_wrap=True)
        if capture.words is not None:
            for i, token in enumerate(capture.tokens):
                words = " ".join(visible(str(w), 40) for w in capture.words[i].reshape(-1))
                stdout().print(f"  {visible(token, 40)}: {words}", markup=False, soft_wrap=True)
    if large:
        note("--json has the numbers")


def _headline(text: str) -> None:
    """Above a table; one of the table's own would be broken to its width."""
    stdout().print(text, style="italic", markup=False, soft_wrap=True)


def shade(p: float) -> str:
    """From dim grey to a bright colour on dark, both readable on light."""
    p = min(max(p, 0.0), 1.0)
    if p < 0.05:
        return "dim"
    strength = math.sqrt(p)
    red, green = int(150 - 130 * strength), int(120 + 60 * strength)
    return f"{'bold ' if p >= 0.5 else ''}rgb({red},{green},150)"


def visible(text: str, most: int = _WIDEST) -> str:
    """A token as it can be read: white space made visible, long ones cut."""
    shown = text.replace(" ", "·").replace("\n", "⏎").replace("\t", "⇥") or "∅"
    shown = "".join(c if c.isprintable() else "\ufffd" for c in shown)
    return shown if len(shown) <= most else shown[: most - 1] + "…"


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return " ".join(f"{x:.4g}" for x in value)
    return "" if value is None else str(value)
