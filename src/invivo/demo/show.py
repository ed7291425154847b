"""The demo from beginning to end: model, adapters, server, load, tables, page."""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from invivo.demo import report
from invivo.demo.adapters import write_random_adapter
from invivo.demo.server_process import serving
from invivo.demo.workload import ADAPTERS, Done, Task, run_load, tasks
from invivo.errors import Unavailable

if TYPE_CHECKING:
    from invivo.lm import LM

MODEL = "smollm2-135m"
CONCURRENCY = 16


def run_demo(*, port: int = 0, stay: bool = False, as_json: bool = False) -> None:
    """Run the demo.

    Args:
        port: of the server, 0 takes a free one.
        stay: serve on after the tables, until Ctrl-C.
        as_json: print the measurements as JSON on standard output, all else on standard error.

    Raises:
        Unavailable: a request of the load failed, or the server did not start.
    """
    console = Console(stderr=as_json, highlight=False)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="invivo-demo-")))
        model_folder = prepare_model(console)
        adapters = {
            adapter: write_random_adapter(folder / adapter, model_folder, seed)
            for seed, adapter in enumerate(ADAPTERS)
        }
        console.print(f"two untrained LoRA adapters: {', '.join(ADAPTERS)}")
        with console.status("starting the server"):
            url = stack.enter_context(serving(MODEL, adapters, port, folder / "server.log"))
        console.print(f"serving at [bold]{url}[/bold] (open it to watch the load)")
        results, engine, model = measured(console, url)
        if as_json:
            document = report.document(results, engine, model)
            sys.stdout.write(json.dumps(document, indent=2) + "\n")
        else:
            report.show(console, results, engine)
        failed = [done for done in results if done.error]
        if failed:
            raise Unavailable(f"{len(failed)} of {len(results)} requests failed")
        if stay:
            wait(console, url)


def prepare_model(console: Console) -> Path:
    """The model's folder; the first time its package is found and converted."""
    from invivo.models.resolve import resolve

    began = time.perf_counter()
    with console.status(f"preparing {MODEL} (the first time it is converted once)"):
        folder = resolve(MODEL)
    console.print(f"{MODEL} is ready after {time.perf_counter() - began:.1f} s")
    return folder


def measured(console: Console, url: str) -> tuple[list[Done], dict[str, Any], dict[str, Any]]:
    """Run the load against the server: results, engine figures, model information."""
    import invivo

    load = tasks()
    with invivo.connect(url) as lm:
        before = lm.stats()
        began = time.perf_counter()
        results = asyncio.run(with_bars(console, lm, load))
        seconds = time.perf_counter() - began
        return results, report.engine_figures(before, lm.stats(), seconds), asdict(lm.info())


async def with_bars(console: Console, lm: LM, load: list[Task]) -> list[Done]:
    """The load with one bar a purpose."""
    columns = (
        TextColumn("{task.description:<18}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        shown = {}
        for task in load:
            if task.purpose not in shown:
                total = sum(t.purpose == task.purpose for t in load)
                shown[task.purpose] = bars.add_task(task.purpose, total=total)
        return await run_load(
            lm, load, CONCURRENCY, lambda done: bars.advance(shown[done.task.purpose])
        )


def wait(console: Console, url: str) -> None:
    """Serve on until Ctrl-C."""
    console.print(f"\nThe live page is at [bold]{url}[/bold]; Ctrl-C ends the demo.")
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        console.print("bye")
