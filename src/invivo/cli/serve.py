"""``invivo serve``: the OpenAI-compatible server and the live page."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from invivo.cli import options
from invivo.cli.output import examples, note
from invivo.errors import Conflict

if TYPE_CHECKING:
    from invivo.server.settings import Settings

SERVER, LIMITS, TUNING = "Server", "Limits", "Fine-tuning"
EXAMPLES = examples(
    "invivo serve                               SmolLM2 at http://127.0.0.1:8000",
    "invivo serve Qwen/Qwen3-0.6B --port 9000   any Hub id or local folder",
    "invivo serve --adapter poet=./poet         clients ask for smollm2-135m:poet",
    "invivo serve --state ./state --tpot-ms 30  fine-tuning jobs kept there; 30 ms a token first",
    "invivo keys add me && invivo serve --host 0.0.0.0",
)


def serve(
    model: Annotated[
        str,
        typer.Argument(help="Model name, folder, file or Hub id.", envvar="INVIVO_MODEL"),
    ] = options.DEFAULT_MODEL,
    host: Annotated[
        str,
        typer.Option(
            "--host",
            help="Address to listen on; anything but loopback needs keys.",
            rich_help_panel=SERVER,
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int,
        typer.Option(
            "--port",
            "-p",
            min=0,
            max=65535,
            help="0 takes a free one, which is said when it serves.",
            rich_help_panel=SERVER,
        ),
    ] = 8000,
    name: Annotated[
        str | None,
        typer.Option("--name", help="Model name for clients.", rich_help_panel=SERVER),
    ] = None,
    require_keys: Annotated[
        bool,
        typer.Option(
            "--require-keys", help="Ask for keys on loopback too.", rich_help_panel=SERVER
        ),
    ] = False,
    database: Annotated[
        str | None,
        typer.Option(
            "--database",
            envvar="INVIVO_DATABASE",
            help="SQLAlchemy URL of the key store.",
            rich_help_panel=SERVER,
        ),
    ] = None,
    origin: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-origin",
            help="Another web page that may call this server; may be repeated.",
            rich_help_panel=SERVER,
        ),
    ] = None,
    runs: Annotated[
        Path,
        typer.Option(
            "--runs",
            envvar="INVIVO_RUNS",
            help="Training runs that the page shows.",
            rich_help_panel=SERVER,
        ),
    ] = Path("runs"),
    quiet: Annotated[
        bool, typer.Option("--quiet", help="No line for each request.", rich_help_panel=SERVER)
    ] = False,
    adapter: options.Adapters = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    cache: Annotated[
        str | None,
        typer.Option(
            "--cache",
            metavar="SIZE",
            help="Memory for keys and values, e.g. 2GiB; derived if not given.",
            rich_help_panel=options.MODEL,
        ),
    ] = None,
    max_model_len: Annotated[
        int | None,
        typer.Option(
            "--max-model-len",
            min=1,
            help="Longest prompt and answer together, in tokens.",
            rich_help_panel=LIMITS,
        ),
    ] = None,
    max_running: Annotated[
        int | None,
        typer.Option(
            "--max-running",
            min=1,
            help="Sequences in a batch; 256 on a GPU, 64 on a CPU if not given.",
            rich_help_panel=LIMITS,
        ),
    ] = None,
    max_batch_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-batch-tokens",
            min=1,
            help="Tokens of an iteration; 2048 on a GPU, 192 on a CPU if not given.",
            rich_help_panel=LIMITS,
        ),
    ] = None,
    max_concurrent: Annotated[
        int,
        typer.Option(
            "--max-concurrent",
            min=1,
            help="Requests at once; more are answered 429.",
            rich_help_panel=LIMITS,
        ),
    ] = 512,
    max_output: Annotated[
        int | None,
        typer.Option(
            "--max-output", min=1, help="Longest answer, in tokens.", rich_help_panel=LIMITS
        ),
    ] = None,
    max_body: Annotated[
        str,
        typer.Option(
            "--max-body", metavar="SIZE", help="Largest request body.", rich_help_panel=LIMITS
        ),
    ] = "4MiB",
    max_file: Annotated[
        str,
        typer.Option(
            "--max-file", metavar="SIZE", help="Largest training file.", rich_help_panel=LIMITS
        ),
    ] = "512MiB",
    state: Annotated[
        Path | None,
        typer.Option(
            "--state",
            metavar="DIR",
            envvar="INVIVO_STATE",
            help="Folder of training files, jobs and stored programs; a server started with it "
            "again goes on with them. [dim]\\[default: in the user's data folder][/dim]",
            file_okay=False,
            show_default=False,
            rich_help_panel=TUNING,
        ),
    ] = None,
    tpot_ms: Annotated[
        float | None,
        typer.Option(
            "--tpot-ms",
            min=0.1,
            help="Milliseconds per output token that training leaves to requests. "
            "[dim]\\[default: 50 on a GPU, 200 on a CPU][/dim]",
            show_default=False,
            rich_help_panel=TUNING,
        ),
    ] = None,
    ttft_ms: Annotated[
        float,
        typer.Option(
            "--ttft-ms",
            min=0.1,
            help="Milliseconds to the first token that training leaves to requests.",
            rich_help_panel=TUNING,
        ),
    ] = 5000.0,
    burst: Annotated[
        float,
        typer.Option(
            "--burst",
            min=1,
            help="How many times --tpot-ms may pass between two tokens of an answer that is early: "
            "more than 1 gathers slack for larger pieces of training, at the same mean pace; "
            "1 keeps every token within the promise.",
            rich_help_panel=TUNING,
        ),
    ] = 2.5,
    policy: Annotated[
        str,
        typer.Option(
            "--policy",
            help="How training shares the device: co-serve, temporal:N, dynamic-temporal, none.",
            rich_help_panel=TUNING,
        ),
    ] = "co-serve",
    max_jobs: Annotated[
        int,
        typer.Option(
            "--max-jobs",
            min=1,
            help="Jobs at once; more wait their turn.",
            rich_help_panel=TUNING,
        ),
    ] = 4,
) -> None:
    """Serve a model over HTTP: OpenAI's endpoints and more, with a live page at /."""
    from invivo.cli.opening import opened
    from invivo.server.run import bound, run
    from invivo.server.settings import Settings

    settings = Settings(
        host=host,
        port=port,
        require_keys=require_keys,
        database=database,
        served_name=name,
        max_body_bytes=options.parse_bytes(max_body, "--max-body"),
        max_file_bytes=options.parse_bytes(max_file, "--max-file"),
        max_concurrent=max_concurrent,
        max_output_tokens=max_output,
        allowed_origins=tuple(origin or ()),
        runs=runs,
    )
    paths = options.adapter_paths(adapter)
    # Asked before a large model is loaded; the server asks again.
    refuse_exposure(settings)
    bound(settings).close()
    logging.basicConfig(
        level=logging.WARNING if quiet else logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    logging.getLogger("uvicorn").setLevel(logging.WARNING)  # the note below says that it serves
    with opened(
        model,
        device=device,
        dtype=dtype,
        adapters=paths,
        kv_bytes=None if cache is None else options.parse_bytes(cache, "--cache"),
        max_model_len=max_model_len,
        max_running=max_running,
        max_batch_tokens=max_batch_tokens,
        state=state,
        tpot_ms=tpot_ms,
        ttft_ms=ttft_ms,
        burst=burst,
        policy=policy,
        max_jobs=max_jobs,
    ) as lm:
        info = lm.info()
        shown = f"[{host}]" if ":" in host else host
        try:
            lm.resume_jobs()
        except Conflict as error:  # another server of this model trains
            if state is not None:
                raise
            note(f"without fine-tuning: {error}")

        def told(taken: int) -> None:
            where = f"http://{shown}:{taken}"
            note(f"{info.name} ({info.dtype} on {info.device}) at {where}, Ctrl-C ends it")

        run(lm, settings, told)


def refuse_exposure(settings: Settings) -> None:
    """Raises InvalidRequest where the settings would expose the server without any key."""
    from invivo.server.auth import check_exposure
    from invivo.server.keys import KeyStore

    if settings.keyed:
        keys = KeyStore(settings.database_url)
        try:
            check_exposure(settings, keys)
        finally:
            keys.close()
