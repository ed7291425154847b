"""The ``invivo`` command: its groups, its version, and how errors leave it.

Nothing heavy is imported here or at the top of a command's module: ``invivo --help`` must answer
at once, so each command imports torch and friends when it runs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from invivo.cli import (
    adapters,
    bench,
    chat,
    demo,
    explain,
    finetune,
    generate,
    jobs,
    keys,
    look,
    models,
    plan,
    runs,
    score,
    serve,
    simulate,
    study,
    train,
)
from invivo.cli.output import drop_unwritten, examples, fail, open_closed_streams
from invivo.errors import InvalidRequest, InvivoError

app = typer.Typer(
    name="invivo",
    help="One living language model: chat, scoring, embeddings and adapters from one engine.",
    epilog=examples(
        "invivo chat                                  talk to SmolLM2 here",
        "invivo serve                                 OpenAI's routes and a live page",
        "invivo generate 'The capital of France is'   continue a text",
    ),
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("serve", epilog=serve.EXAMPLES)(serve.serve)
app.command("chat", epilog=chat.EXAMPLES)(chat.chat)
app.command("generate", epilog=generate.EXAMPLES)(generate.generate)
app.command("score", epilog=score.EXAMPLES)(score.score)
app.command("look", epilog=look.EXAMPLES)(look.look)
app.command("explain", epilog=explain.EXAMPLES)(explain.explain)
app.command("finetune", epilog=finetune.EXAMPLES)(finetune.finetune)
app.add_typer(jobs.app, name="jobs")
app.add_typer(adapters.app, name="adapters")
app.add_typer(models.app, name="models")
app.add_typer(keys.app, name="keys")
app.command("train", epilog=train.EXAMPLES)(train.train)
app.add_typer(runs.app, name="runs")
app.command("plan", epilog=plan.EXAMPLES)(plan.plan)
app.command("bench", epilog=bench.EXAMPLES)(bench.bench)
app.command("simulate", epilog=simulate.EXAMPLES)(simulate.simulate)
app.add_typer(study.app, name="study")
app.command("demo", epilog=demo.EXAMPLES)(demo.demo)


# What only the server needs.
SERVE_MODULES = ("fastapi", "uvicorn", "pydantic", "prometheus_client", "sqlalchemy", "multipart")


def show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"invivo {version('invivo')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Options before the command."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 failed, 2 wrongly asked, 130 interrupted."""
    open_closed_streams()
    try:
        try:
            app(args=None if arguments is None else list(arguments), prog_name="invivo")
        finally:
            sys.stdout.flush()  # a full disk is told below, not by the interpreter at its end
    except InvalidRequest as error:
        fail(str(error))
        sys.exit(2)
    except InvivoError as error:
        fail(str(error))
        sys.exit(1)
    except ModuleNotFoundError as error:
        if error.name not in SERVE_MODULES:
            raise
        fail(f"{error.name} is not installed. Run: pip install 'invivo[serve]'")
        sys.exit(1)
    except BrokenPipeError:  # whoever read has seen enough
        drop_unwritten()
        sys.exit(1)
    except OSError as error:
        if error.strerror is None:
            raise
        drop_unwritten()
        fail(f"{error.filename}: {error.strerror}" if error.filename else error.strerror)
        sys.exit(1)


if __name__ == "__main__":
    main()
