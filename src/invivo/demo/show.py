"""The demo from beginning to end: model, server, load, learning, tables, report."""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)

from invivo.demo import learning, report
from invivo.demo.adapters import write_random_adapter
from invivo.demo.html_report import write_report
from invivo.demo.learning import NAME, Learning
from invivo.demo.phases import serve_alone, serve_and_learn
from invivo.demo.report import Findings
from invivo.demo.server_process import serving
from invivo.demo.workload import ADAPTERS, Done, tasks
from invivo.errors import Unavailable
from invivo.lm_jobs import JobInfo

if TYPE_CHECKING:
    from invivo.lm import LM

MODEL = "smollm2-135m"
TPOT_MS = 150.0  # what two CPU cores can keep with several answers and a prompt at once


def run_demo(
    *, port: int = 0, stay: bool = False, as_json: bool = False, runs: Path = Path("runs/demo")
) -> None:
    """Run the demo.

    Args:
        port: of the server, 0 takes a free one.
        stay: serve on after the tables, until Ctrl-C.
        as_json: print the measurements as JSON on standard output, all else on standard error.
        runs: the report goes into a new folder in it.

    Raises:
        Unavailable: a request or the job failed, or the server did not start.
        MissingDependency: matplotlib is not installed.
    """
    began = time.time()
    console = Console(stderr=as_json, highlight=False)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="invivo-demo-")))
        model_folder = prepare_model(console)
        adapters = {
            adapter: write_random_adapter(folder / adapter, model_folder, seed)
            for seed, adapter in enumerate(ADAPTERS)
        }
        promise = ("--tpot-ms", str(TPOT_MS))
        options = (*promise, "--state", str(folder / "state"))
        with console.status("starting the server"):
            running = serving(MODEL, adapters, port, folder / "server.log", options)
            url = stack.enter_context(running)
        console.print(f"serving at [bold]{url}[/bold] (open it to watch)")
        findings = measured(console, url, began)
        path = runs / time.strftime("%Y%m%d-%H%M%S", time.localtime(began)) / "report.html"
        write_report(findings, path)
        if as_json:
            document = report.document(findings) | {"report": str(path)}
            sys.stdout.write(json.dumps(document, indent=2) + "\n")
        else:
            report.show(console, findings)
        console.print(f"\nThe report is [bold]{path}[/bold] ({findings.seconds:.0f} s in all).")
        failed = report.failed(findings)
        if failed:
            raise Unavailable(f"{len(failed)} requests failed")
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


def measured(console: Console, url: str, began: float) -> Findings:
    """Serve alone, then serve and learn; everything goes through the server's public API."""
    import invivo

    with invivo.connect(url) as lm:
        return asyncio.run(_measured(console, lm, began))


async def _measured(console: Console, lm: LM, began: float) -> Findings:
    load, learned = tasks(), Learning()
    with console.status("asking and scoring, before anything is learned"):
        learned.before = await learning.answers(lm)
        learned.held_out.append((0, await learning.held_out_loss(lm)))
    console.print(f"loss on the dialogues that are held out: {learned.held_out[0][1]:.3f}")
    with _bars(console) as bars:
        bar = bars.add_task("serving alone", total=len(load), figures="")
        alone = await serve_alone(lm, load, lambda done: bars.advance(bar))
    with _bars(console) as bars:
        served = bars.add_task("serving", total=None, figures="")
        learns = bars.add_task(f"learning {NAME}", total=None, figures="")

        def looked(info: JobInfo) -> None:
            loss = "" if info.loss is None else f"loss {info.loss:.3f}"
            rate = "" if info.tokens_per_second is None else f"{info.tokens_per_second:.0f} tok/s"
            bars.update(
                learns,
                total=info.n_steps or None,
                completed=info.step,
                figures=f"{loss} {rate}".strip(),
            )

        def finished(done: Done) -> None:
            bars.advance(served)

        tuned = await serve_and_learn(
            lm, lambda: learning.start(lm), load, learned, finished, looked
        )
    with console.status(f"asking and scoring {NAME}"):
        learned.after = await learning.answers(lm, NAME)
        assert learned.job is not None
        learned.held_out.append((learned.job.step, await learning.held_out_loss(lm, NAME)))
    stats = await lm.astats()
    return Findings(
        model=asdict(await lm.ainfo()),
        slo=stats["slo"],
        phases=[alone, tuned],
        learning=learned,
        tokens=stats["tokens"],
        seconds=time.time() - began,
    )


@contextmanager
def _bars(console: Console) -> Iterator[Progress]:
    columns = (
        TextColumn("{task.description:<16}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[figures]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        yield bars


def wait(console: Console, url: str) -> None:
    """Serve on until Ctrl-C."""
    console.print(
        f"The live page is at [bold]{url}[/bold]: chat with {NAME} there. Ctrl-C ends the demo."
    )
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        console.print("bye")
