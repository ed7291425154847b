"""A GLA Transformer beside a Transformer++ of the same size: text, length, recall, decoding.

    PYTHONPATH=src python bench/gla_quality.py --sources A.txt.xz B.txt.xz --pack corpus.tar.xz
    PYTHONPATH=src python bench/gla_quality.py --prepared corpus.tar.xz --out DIR [--seconds 480]

The first line prepares text (tokenizer, token shards), the second runs the comparison on it:

- both models from scratch with the same tokens, rows, order, optimizer and number of steps, for
  each seed; held-out bits per byte with intervals over seeds (Student, Welch), of the books that
  are evaluated during training and of others that are not;
- held-out text in rows of 16,384 tokens, 16 times those of training: perplexity by position;
- recall of key-value pairs by two-layer models trained on that task alone, with GLA also with a
  short convolution;
- a step of decoding and the memory of a sequence, by the length of its context, in the engine;
- a smaller GLA model, trained with what time is left for it.

How many steps fit into ``--seconds`` is measured first, all models of a kind then take the same
number; the plan is kept in ``--work``, and a second call with the same folder goes on where the
first stopped (exit 3: call again; exit 1: a part failed, and the others are there). DIR gets
gla_quality.json, runs.tar.gz (the same, pages, curves, samples, the small model's config and
tokenizer) and the small model's weights.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import tarfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch

from engine_gpu import serve
from invivo.engine.engine import Engine, EngineConfig
from invivo.errors import MissingDependency
from invivo.models.cache import bytes_per_block, bytes_per_slot
from invivo.models.load import load_model
from invivo.training.config import (
    AdamW,
    Checkpoints,
    Data,
    Evaluation,
    Export,
    Recall,
    Schedule,
    Source,
    Steps,
    TokenizerSettings,
    TrainConfig,
)
from invivo.training.evaluate import Nats, by_position, decoder_nats, held_out
from invivo.training.prepare import prepare
from invivo.training.report import write_comparison
from invivo.training.run import train
from invivo.training.run_folder import RunFolder
from invivo.training.run_record import RunRecord, read_run
from invivo.training.seeds import difference, mean_over
from invivo.training.shards import open_shards
from invivo.training.stream import Batch

KINDS = ("gla", "transformer")
# Without a short convolution a layer must be spent on bringing a value to its key.
RECALL_KINDS = (*KINDS, "gla-conv")
# Shares of the time that is left when speeds are known; the rest is for evaluation and decoding.
SHARES = {"text": 0.46, "asset": 0.24, "recall": 0.15}
SPEED_STEPS = 12
PREFILL = 16384  # tokens of an iteration while prompts are read


@dataclass(frozen=True, slots=True)
class Size:
    """How large everything is.

    Attributes:
        model, asset, recall: (width, layers, hidden units of the feed-forward, heads of GLA).
        length, long: tokens of a training row and of the longest evaluated one.
        batch: rows of a step.
        epochs: most of them.
        steps: most of them; None: no limit but the time's.
        contexts, batches: of decoding.
        decoded: tokens that all rows of a batch write together.
    """

    model: tuple[int, int, int, int]
    asset: tuple[int, int, int, int]
    recall: tuple[int, int, int, int]
    length: int
    long: int
    batch: int
    epochs: float
    steps: int | None
    task: Recall
    recall_length: int
    recall_batch: int
    long_rows: int
    contexts: tuple[int, ...]
    batches: tuple[int, ...]
    decoded: int


FULL = Size(
    model=(512, 8, 1408, 4),
    asset=(256, 6, 704, 2),
    recall=(128, 2, 256, 2),
    length=1024,
    long=16384,
    batch=32,
    epochs=6.0,
    steps=None,
    task=Recall(pairs=(4, 8, 16, 32), keys=64, values=64),
    recall_length=128,
    recall_batch=256,
    long_rows=32,
    contexts=(1024, 4096, 16000),
    batches=(1, 16),
    decoded=64,
)
SMALL = Size(
    model=(32, 2, 48, 2),
    asset=(16, 1, 32, 2),
    recall=(16, 1, 16, 2),
    length=32,
    long=128,
    batch=4,
    epochs=6.0,
    steps=6,
    task=Recall(pairs=(2, 4), keys=6, values=6),
    recall_length=16,
    recall_batch=4,
    long_rows=2,
    contexts=(16, 64),
    batches=(1, 2),
    decoded=4,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sources", nargs="+", help="text files to prepare")
    parser.add_argument("--vocab", type=int, default=8192, help="of the tokenizer learned")
    parser.add_argument("--pack", type=Path, help="write what was prepared here, .tar.xz")
    parser.add_argument("--prepared", type=Path, help="a folder of shards, or such a pack")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--work", type=Path, default=Path("runs") / "gla-quality")
    parser.add_argument("--seconds", type=float, default=480.0)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, help="most of any run")
    parser.add_argument("--small", action="store_true", help="tiny models: a check on any machine")
    args = parser.parse_args()
    if args.sources:
        folder = prepared_text(args.sources, args.vocab, args.work)
        if args.pack:
            pack(folder, args.pack)
    elif args.prepared:
        folder = unpacked(args.prepared, args.work)
    else:
        parser.error("give --sources or --prepared")
    if args.pack:
        return
    size = SMALL if args.small else FULL
    if args.steps:
        size = replace(size, steps=args.steps)
    comparison = Comparison(size, folder, args.work, args.out, args.seconds, args.seeds)
    sys.exit(comparison.run())


def prepared_text(sources: Sequence[str], vocab: int, work: Path) -> Path:
    data = Data(sources=tuple(Source(path=source) for source in sources))
    return prepare(data, TokenizerSettings(vocab_size=vocab), work / "prepared").folder


def pack(folder: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(target, "w:xz") as packed:
        packed.add(folder, "corpus")
    print(f"{target}: {target.stat().st_size / 2**20:.1f} MiB")


def unpacked(path: Path, work: Path) -> Path:
    if path.is_dir():
        return path
    folder = work / "prepared" / "corpus"
    if not (folder / "manifest.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path) as packed:
            packed.extractall(folder.parent, filter="data")
    return folder


class Comparison:
    """All parts in their order, each skipped where its result is there."""

    def __init__(
        self, size: Size, prepared: Path, work: Path, out: Path, seconds: float, seeds: int
    ) -> None:
        self.size = size
        self.prepared = prepared.resolve()
        self.shards = open_shards(self.prepared)
        self.runs, self.out = work / "runs", out
        self.seconds, self.seeds = seconds, range(seeds)
        self.began = time.monotonic()
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.kept = work / "results.json"
        self.results: dict[str, Any] = {}
        if self.kept.exists():
            self.results = json.loads(self.kept.read_text())

    def run(self) -> int:
        """The exit code."""
        self.note("device", torch.cuda.get_device_name() if self.device == "cuda" else "cpu")
        self.note("versions", {"python": platform.python_version(), "torch": torch.__version__})
        self.note("corpus", {"tokens": self.shards.tokens, "bytes": self.shards.bytes})
        if "plan" not in self.results:
            self.note("plan", self.plan())
        self.say(f"plan {self.results['plan']}")
        text, recall, asset = self.configs()
        parts: list[tuple[str, Callable[[], bool]]] = [
            *((config.name, partial(self.trained, config)) for config in text),
            ("test", self.test),
            ("positions", self.positions),
            ("decode", self.decode),
            (asset.name, partial(self.trained, asset)),
            *((config.name, partial(self.trained, config)) for config in recall),
            ("summary", self.summarize),
        ]
        done, failed = True, []
        for name, part in parts:
            try:
                done &= part()
            except Exception:  # one part's fault is no reason to lose the others
                traceback.print_exc()
                failed.append(name)
        self.say(f"failed: {failed}" if failed else "done" if done else "call again for the rest")
        return 1 if failed else 0 if done else 3

    def say(self, text: str) -> None:
        print(f"[{self.spent():5.0f} s] {text}", flush=True)

    def note(self, name: str, value: Any) -> None:
        self.results[name] = value
        self.kept.parent.mkdir(parents=True, exist_ok=True)
        self.kept.write_text(json.dumps(self.results, indent=1))

    def spent(self) -> float:
        return time.monotonic() - self.began

    # What is trained

    def configs(self) -> tuple[list[TrainConfig], list[TrainConfig], TrainConfig]:
        """Text, recall, and the small model."""
        plan = {name: part["steps"] for name, part in self.results["plan"].items()}
        text = [self.text(kind, seed, plan["text"]) for seed in self.seeds for kind in KINDS]
        recall = [
            self.recall(kind, seed, plan["recall"]) for seed in self.seeds for kind in RECALL_KINDS
        ]
        return text, recall, self.asset(plan["asset"])

    def text(self, kind: str, seed: int, steps: int) -> TrainConfig:
        size = self.size
        data = Data(prepared=str(self.prepared), length=size.length)
        model = shape(kind, size.model, size.long)
        return self.config(f"{kind}-seed{seed}", model, data, seed, steps, size.batch, 1e-3)

    def asset(self, steps: int) -> TrainConfig:
        size = self.size
        data = Data(prepared=str(self.prepared), length=size.length)
        model = shape("gla", size.asset, size.long)
        config = self.config("gla-small", model, data, 0, steps, size.batch, 2e-3)
        prompts = ("Once upon a time", "The old man looked at the sea and")
        told = Evaluation(every=max(1, steps // 4), windows=64, prompts=prompts, sample_tokens=40)
        return replace(config, evaluation=told)

    def recall(self, kind: str, seed: int, steps: int) -> TrainConfig:
        size = self.size
        data = Data(kind="recall", recall=size.task, length=size.recall_length)
        model = shape(kind, size.recall, size.recall_length)
        name = f"recall-{kind}-seed{seed}"
        return self.config(name, model, data, seed, steps, size.recall_batch, 2e-3)

    def config(
        self, name: str, model: dict[str, Any], data: Data, seed: int, steps: int, batch: int,
        rate: float,
    ) -> TrainConfig:  # fmt: skip
        return TrainConfig(
            name=name,
            model=model,
            data=data,
            seed=seed,
            train=Steps(
                steps=steps,
                batch=batch,
                precision="bfloat16" if self.device == "cuda" else "float32",
                log_every=10 if self.size.steps is None else 1,
            ),
            optimizer=AdamW(learning_rate=rate),
            schedule=Schedule(warmup=max(1, steps // 20)),
            evaluation=Evaluation(every=max(1, steps // 8), windows=64),
            checkpoint=Checkpoints(every=steps, keep=1),
            export=Export(dtype="bfloat16"),
        )

    def trained(self, config: TrainConfig) -> bool:
        """Whether the run is complete."""
        folder = RunFolder(self.runs / config.name)
        if folder.exists and folder.manifest()["status"] == "done":
            return True
        left = self.seconds - self.spent()
        if left <= 5:
            return False
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        outcome = train(config, runs=self.runs, minutes=left / 60, device=self.device)
        numbers = {} if outcome.evaluation is None else outcome.evaluation
        shown = {k: numbers[k] for k in ("bits_per_byte", "accuracy") if k in numbers}
        self.say(f"{config.name}: {outcome.status} at step {outcome.step}, {shown}")
        return outcome.status == "done"

    def plan(self) -> dict[str, Any]:
        """Steps that fit, by what a few steps of each kind take."""
        size, n = self.size, len(self.seeds)
        kinds = {
            "text": [self.text(kind, 0, SPEED_STEPS) for kind in KINDS],
            "asset": [self.asset(SPEED_STEPS)],
            "recall": [self.recall(kind, 0, SPEED_STEPS) for kind in RECALL_KINDS],
        }
        seconds = {
            name: [self.step_seconds(config) for config in configs]
            for name, configs in kinds.items()
        }
        left, plan = self.seconds - self.spent(), {}
        for name, each in seconds.items():
            repeated = 1 if name == "asset" else n
            steps = int(0.9 * SHARES[name] * left / (repeated * sum(each)))
            if name != "recall":
                tokens = self.shards.tokens["train"]
                steps = min(steps, int(size.epochs * tokens / (size.batch * size.length)))
            if size.steps is not None:
                steps = min(steps, size.steps)
            plan[name] = {"steps": max(2, steps), "step_seconds": each}
        return plan

    def step_seconds(self, config: TrainConfig) -> float:
        """Of one step, by a run that is thrown away; compiles what the real one needs."""
        runs = self.runs / ".speed"
        quiet = Evaluation(every=0, windows=1)
        train_ = replace(config.train, log_every=1)
        config = replace(config, name=f"speed-{config.name}", evaluation=quiet, train=train_)
        train(config, runs=runs, mode="fresh", device=self.device)
        seconds = [line["seconds"] for line in read_run(runs / config.name).steps]
        self.say(f"{config.name}: {1e3 * seconds[0]:.0f} ms for the first step")
        return median(b - a for a, b in pairwise(seconds[3:]))

    # What is measured on them

    def decode(self) -> bool:
        """A step of decoding and the memory of a sequence, by kind, context and batch."""
        if "decode" in self.results or not self.complete():
            return "decode" in self.results
        size, rows = self.size, []
        for kind in KINDS:
            model = load_model(str(self.runs / f"{kind}-seed0" / "model"), device=self.device)
            dtype = model.decoder.embed.dtype
            settings = EngineConfig(
                max_batch_tokens=PREFILL,
                max_model_len=size.long,
                max_running=max(size.batches),
                prefix_cache=False,
            )
            engine = Engine(model, settings)
            per_token = bytes_per_block(model.config, block_size=16, dtype=dtype) / 16
            per_sequence = bytes_per_slot(model.config, dtype=dtype)
            for context in size.contexts:
                for batch in size.batches:
                    # While the last prompts are read the first ones write already.
                    meanwhile = 2 * math.ceil(batch * context / PREFILL)
                    _, step_ms = serve(engine, batch, context, size.decoded + meanwhile)
                    memory = per_sequence + per_token * context
                    row = {"kind": kind, "context": context, "batch": batch}
                    rows.append(row | {"step_ms": round(step_ms, 4), "bytes_a_sequence": memory})
                    self.say(f"decode {rows[-1]}")
            engine.close()
        self.note("decode", rows)
        return True

    def complete(self) -> bool:
        """Whether all models of text are trained."""
        folders = [RunFolder(self.runs / config.name) for config in self.configs()[0]]
        return all(f.exists and f.manifest()["status"] == "done" for f in folders)

    def test(self) -> bool:
        """Bits per byte of books that no evaluation during training has read."""
        if "test" in self.results or not self.complete():
            return "test" in self.results
        found: dict[str, Any] = {}
        settings = {"split": "test", "length": self.size.length, "batch": self.size.batch}
        for seed in self.seeds:
            gla, transformer = (self.nats(kind, seed) for kind in KINDS)
            for kind, nats in zip(KINDS, (gla, transformer), strict=True):
                read = held_out(nats, self.shards, **settings)
                found[f"{kind}-seed{seed}"] = asdict(read)
                self.say(f"test {kind}-seed{seed}: {read.bits_per_byte:.4f} bits per byte")
            # Row by row: what is hard for both models does not widen the interval.
            gap = held_out(partial(_less, gla, transformer), self.shards, **settings)
            found[f"gla less transformer-seed{seed}"] = asdict(gap)
        gla, transformer = (
            [found[f"{kind}-seed{seed}"]["bits_per_byte"] for seed in self.seeds] for kind in KINDS
        )
        gap = asdict(difference(gla, transformer))
        self.note("test", {"runs": found, "gla less transformer": gap})
        return True

    def nats(self, kind: str, seed: int) -> Nats:
        folder = self.runs / f"{kind}-seed{seed}" / "model"
        return decoder_nats(load_model(str(folder), device=self.device).decoder)

    def positions(self) -> bool:
        """Perplexity by position in rows longer than those of training."""
        if "positions" in self.results or not self.complete():
            return "positions" in self.results
        found = {}
        for seed in self.seeds:
            for kind in KINDS:
                folder = RunFolder(self.runs / f"{kind}-seed{seed}")
                buckets = by_position(
                    self.nats(kind, seed),
                    self.shards,
                    length=self.size.long,
                    rows=self.size.long_rows,
                )
                found[folder.path.name] = [asdict(bucket) for bucket in buckets]
                last = read_run(folder.path).steps[-1]
                line = {"kind": "positions", "step": last["step"], "tokens": last["tokens"]}
                length = {"length": self.size.long}
                folder.metrics.add(line | length | {"buckets": found[folder.path.name]})
                losses = [round(bucket.loss, 3) for bucket in buckets]
                self.say(f"positions {folder.path.name} {losses}")
        self.note("positions", found)
        return True

    # What comes out

    def summarize(self) -> bool:
        """Results, curves, pages and the small model go to the folder for what comes out."""
        text, recall, asset = self.configs()
        groups = {"text": self.records(text), "recall": self.records(recall)}
        there = [*groups["text"], *groups["recall"], *self.records([asset])]
        self.note("runs", {run.name: told(run) for run in there})
        for name, measure in (("text", "bits_per_byte"), ("recall", "accuracy")):
            self.note(name, compared(groups[name], measure))
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "gla_quality.json").write_text(json.dumps(self.results, indent=1) + "\n")
        weights = self.runs / asset.name / "model" / "model.safetensors"
        if weights.exists():
            (self.out / f"{asset.name}.safetensors").write_bytes(weights.read_bytes())
        pages = []
        try:
            for name, some in groups.items():
                if some:
                    folders = [run.folder for run in some]
                    pages.append(write_comparison(folders, self.runs.parent / f"{name}.html"))
        except MissingDependency as error:  # `invivo runs report` makes them elsewhere
            self.say(f"no pages: {error}")
        with tarfile.open(self.out / "runs.tar.gz", "w:gz") as packed:
            for page in (self.out / "gla_quality.json", *pages):
                packed.add(page, page.name)
            for run in there:
                for name in ("manifest.json", "metrics.jsonl", "samples.jsonl"):
                    if (run.folder / name).exists():
                        packed.add(run.folder / name, f"runs/{run.name}/{name}")
            for path in sorted(weights.parent.glob("*")):
                if path != weights:
                    packed.add(path, f"{asset.name}/{path.name}")
        return True

    def records(self, configs: Sequence[TrainConfig]) -> list[RunRecord]:
        """Runs that have taken steps."""
        folders = [self.runs / config.name for config in configs]
        records = [read_run(folder) for folder in folders if RunFolder(folder).exists]
        return [record for record in records if record.steps]


def _less(one: Nats, other: Nats, batch: Batch) -> torch.Tensor:
    return one(batch) - other(batch)


def shape(kind: str, size: tuple[int, int, int, int], positions: int) -> dict[str, Any]:
    """``[model]``: all kinds have the same width, depth and feed-forward, and tied embeddings."""
    width, layers, hidden, heads = size
    common = {
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "max_position_embeddings": positions,
        "tie_word_embeddings": True,
    }
    if kind.startswith("gla"):
        conv = {"use_short_conv": kind == "gla-conv"}
        return common | {"model_type": "gla", "num_heads": heads} | conv
    heads = max(1, width // 64) if width >= 64 else 2
    return common | {"model_type": "llama", "num_attention_heads": heads}


def told(run: RunRecord) -> dict[str, Any]:
    last, evaluation = run.steps[-1], run.last or {}
    names = ("bits_per_byte", "low", "high", "loss", "accuracy", "rows")
    return {
        "status": run.manifest["status"],
        "parameters": run.manifest["parameters"],
        "steps": last["step"],
        "tokens": last["tokens"],
        "seconds": last["seconds"],
        "peak_memory": last["memory"],
    } | {name: evaluation[name] for name in names if name in evaluation}


def compared(runs: Sequence[RunRecord], measure: str) -> dict[str, Any]:
    """Means over the seeds of complete runs, and the difference."""
    values = {
        kind: [
            run.last[measure]
            for run in runs
            if run.name.removeprefix("recall-").startswith(f"{kind}-seed")
            and run.last is not None
            and run.manifest["status"] == "done"
        ]
        for kind in RECALL_KINDS
    }
    found: dict[str, Any] = {k: asdict(mean_over(v)) for k, v in values.items() if v}
    if values["gla"] and values["transformer"]:
        gap = difference(values["gla"], values["transformer"])
        found["gla less transformer"] = asdict(gap)
    return found


if __name__ == "__main__":
    main()
