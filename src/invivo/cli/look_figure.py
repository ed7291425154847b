"""The figures of ``invivo look``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from invivo.errors import InvalidRequest, MissingDependency

if TYPE_CHECKING:
    from invivo.instruments.attention_pattern import AttentionPattern
    from invivo.instruments.direct_attribution import DirectAttribution
    from invivo.instruments.logit_lens import LogitLens

_MOST_CELLS = 40  # tokens side by side that can still be read


def check_figure(path: Path, of_program: bool) -> None:
    """Before anything runs: can this be drawn?

    Raises:
        InvalidRequest: another kind of file, no such folder, or a program's own outputs.
        MissingDependency: matplotlib is not installed.
    """
    if of_program:
        raise InvalidRequest(
            "a program's own outputs have no figure",
            field="--figure",
            given=str(path),
            remedy="Use --lens, --attribution or --attention",
        )
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise InvalidRequest("must end in .png, .svg or .pdf", field="--figure", given=str(path))
    if not path.parent.is_dir():
        raise InvalidRequest("there is no such folder", field="--figure", given=str(path.parent))
    try:
        import matplotlib as mpl  # noqa: F401
    except ImportError as error:
        raise MissingDependency(
            "figures need matplotlib", remedy="pip install 'invivo[study]'"
        ) from error


def draw_lens(found: LogitLens, path: Path) -> None:
    """Layers up, tokens across; the likeliest word in each cell, its probability as colour."""
    shown = slice(max(0, len(found.positions) - _MOST_CELLS), None)
    probs = np.exp(found.logprobs[:, shown, 0])
    words, tokens = found.words[:, shown, 0], found.tokens[shown]
    n_rows, n_columns = probs.shape
    figure = _figure(max(4.0, 0.85 * n_columns + 1.8), max(2.5, 0.26 * n_rows + 1.2))
    axes = figure.subplots()
    image = axes.imshow(probs, origin="lower", aspect="auto", cmap="Blues", vmin=0, vmax=1)
    for row in range(n_rows):
        for column in range(n_columns):
            dark = probs[row, column] > 0.5
            text = _plain(str(words[row, column]), 10)
            axes.text(
                column, row, text, ha="center", va="center", fontsize=7, parse_math=False,
                color="white" if dark else "black",
            )  # fmt: skip
    _ticks(axes.set_xticks, tokens)
    axes.set_yticks(
        range(n_rows),
        [_site(s, i) for s, i in zip(found.sites, found.layers, strict=True)],
        fontsize=7,
    )
    axes.set_xlabel("token read at")
    axes.set_ylabel("layer")
    axes.set_title("Logit lens: the likeliest next token", fontsize=10)
    figure.colorbar(image, ax=axes, label="probability", pad=0.01)
    _save(figure, path)


def draw_attribution(found: DirectAttribution, path: Path) -> None:
    """Layers up; heads and the feed-forward across, red for and blue against the token."""
    columns = [found.heads[:, h] for h in range(found.heads.shape[1])]
    table = np.stack([*columns, found.mlp], axis=1)
    n_rows, n_columns = table.shape
    most = float(np.nanmax(np.abs(table))) or 1.0
    figure = _figure(max(4.5, 0.42 * n_columns + 2.2), max(2.8, 0.22 * n_rows + 1.4))
    axes = figure.subplots()
    axes.set_facecolor("#dddddd")
    image = axes.imshow(table, origin="lower", aspect="auto", cmap="RdBu_r", vmin=-most, vmax=most)
    names = [*(str(h) for h in range(n_columns - 1)), "MLP"]
    axes.set_xticks(range(n_columns), names, fontsize=7)
    axes.set_yticks(range(n_rows), found.layers, fontsize=7)
    axes.axvline(n_columns - 1.5, color="black", linewidth=0.8)
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    against = "" if found.minus_word is None else f" minus {_plain(found.minus_word, 20)!r}"
    axes.set_title(
        f"Direct share in the logit of {_plain(found.word, 20)!r}{against}: "
        f"{found.logit:.2f} in all",
        fontsize=10,
        parse_math=False,
    )
    figure.colorbar(image, ax=axes, label="share of the logit", pad=0.02)
    _save(figure, path)


def draw_attention(found: AttentionPattern, path: Path) -> None:
    """One head: queries down, keys across. Several: a panel a layer, heads down, keys across."""
    keys = found.keys
    if found.probs.shape[:2] == (1, 1):
        figure = _figure(max(4.0, 0.3 * len(keys) + 2.4), max(3.2, 0.3 * len(found.queries) + 1.6))
        axes = figure.subplots()
        image = axes.imshow(found.probs[0, 0], aspect="auto", cmap="Blues", vmin=0, vmax=1)
        _ticks(axes.set_xticks, keys)
        _ticks(axes.set_yticks, found.queries, rotation=0)
        axes.set_xlabel("key")
        axes.set_ylabel("query")
        axes.set_title(f"Attention of layer {found.layers[0]}, head {found.heads[0]}", fontsize=10)
    else:
        flat = found.probs[:, :, -1].reshape(-1, len(keys))
        figure = _figure(max(4.0, 0.3 * len(keys) + 2.6), max(3.0, 0.1 * len(flat) + 1.6))
        axes = figure.subplots()
        image = axes.imshow(flat, origin="lower", aspect="auto", cmap="Blues", vmin=0, vmax=1)
        n_heads = len(found.heads)
        middles = [n_heads * (i + 0.5) - 0.5 for i in range(len(found.layers))]
        axes.set_yticks(middles, found.layers, fontsize=7)
        for i in range(1, len(found.layers)):
            axes.axhline(n_heads * i - 0.5, color="#bbbbbb", linewidth=0.5)
        _ticks(axes.set_xticks, keys)
        axes.set_xlabel("key")
        axes.set_ylabel("layer (its heads from below)")
        axes.set_title(f"Where {_plain(found.queries[-1], 20)!r} looks", fontsize=10)
    figure.colorbar(image, ax=axes, label="probability", pad=0.02)
    _save(figure, path)


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(min(width, 40), min(height, 40)), dpi=150, layout="constrained")


def _save(figure: Any, path: Path) -> None:
    """Tokens in scripts that the font lacks are drawn as boxes, without a warning for each."""
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(path)


def _ticks(set_ticks: Any, texts: list[str], rotation: int = 60) -> None:
    labels = [_plain(text, 14) for text in texts]
    set_ticks(range(len(labels)), labels, rotation=rotation, fontsize=7, parse_math=False)


def _site(site: str, layer: int) -> str:
    return str(layer) if layer >= 0 else site


def _plain(text: str, most: int) -> str:
    """A token for a label: what cannot be seen made visible, long ones cut."""
    shown = text.replace("\n", "⏎").replace("\t", "⇥")
    shown = shown if shown.strip() else shown.replace(" ", "·")
    shown = "".join(c if c.isprintable() else "\ufffd" for c in shown)
    return shown if len(shown) <= most else shown[: most - 1] + "…"
