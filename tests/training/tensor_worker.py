"""What two processes that share a decoder by heads and neurons compute, against one alone."""

from __future__ import annotations

import itertools
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tests.training.forked import together
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.debug import CommDebugMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from invivo.engine.adapter_file import read_adapter, write_adapter
from invivo.engine.bypasses import BypassSpec
from invivo.engine.peft_format import from_peft
from invivo.models.config import ModelConfig
from invivo.models.decoder import Decoder
from invivo.sharding.moves import replicated, spread
from invivo.sharding.parallel_plan import Candidate, Mesh, State
from invivo.sharding.placed_lora import PlacedLora
from invivo.training.checkpoint import Checkpoint, checkpoints, read_checkpoint
from invivo.training.config import AdamW, read_config
from invivo.training.loss_model import LossModel
from invivo.training.parallel import Ranks, joined
from invivo.training.run import train
from invivo.training.shape import shape_of
from invivo.training.sharded_lora import (
    LoraSpec,
    Place,
    candidates,
    placed_loras,
    tune,
    whole_loras,
)
from invivo.training.tensor_parallel import place_of, sections_of, split, whole_of

SIZES = {"hidden_size": 16, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6}
MODELS = {
    "grouped heads": {"model_type": "qwen3", "intermediate_size": 20} | SIZES | HEADS,
    "biases": {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_inner": 24},
    "softcap": {"model_type": "gemma2", "intermediate_size": 12, "sliding_window": 5}
    | SIZES
    | HEADS,
    "hybrid": {
        "model_type": "gla",
        "num_heads": 2,
        "intermediate_size": 12,
        "use_short_conv": True,
        "attn": {"layers": [1], "num_heads": 2},
    }
    | SIZES,
}
TOKENS = torch.randint(0, 37, (2, 11), generator=torch.Generator().manual_seed(1))
LABELS = TOKENS.roll(-1, 1).masked_fill(torch.arange(11) % 5 == 3, -100)
STARTS = torch.zeros(2, 11, dtype=torch.bool)
STARTS[:, 0] = STARTS[1, 4] = True


def config_of(name: str) -> ModelConfig:
    return shape_of(MODELS[name], length=16, vocab_size=37, end=0)


def decoder_of(config: ModelConfig, dtype: torch.dtype) -> Decoder:
    decoder = Decoder(config, dtype=dtype)
    generator = torch.Generator().manual_seed(7)
    for parameter in decoder.parameters():
        value = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data.copy_(0.3 * value)
    return decoder


def of_one_process(mesh: DeviceMesh, name: str, dtype: torch.dtype, within: float) -> None:
    """States, loss and every gradient."""
    config = config_of(name)
    alone = LossModel(decoder_of(config, dtype))
    shared = LossModel(decoder_of(config, dtype), recompute="layer")
    split(shared, mesh)
    wanted, _ = alone(TOKENS, LABELS, STARTS)
    found, _ = shared(TOKENS, LABELS, STARTS)
    wanted.backward()
    found.backward()
    close(found, wanted, within, name)
    close(shared.states(TOKENS), alone.states(TOKENS), within, name)
    for place, parameter in shared.decoder.named_parameters():
        gradient = whole_of(config, place, parameter.grad, mesh)
        close(gradient, alone.decoder.get_parameter(place).grad, within, f"{name}: {place}")


def close(found: torch.Tensor, wanted: torch.Tensor, within: float, what: str) -> None:
    torch.testing.assert_close(found, wanted, rtol=within, atol=within, msg=lambda m: f"{what} {m}")


# --- LoRAs ----------------------------------------------------------------------------------------
ON = ("q", "k", "v", "o", "gate", "up", "down")
SPEC = LoraSpec(ON, rank=3, alpha=6.0)
NAME = "grouped heads"


def filled(loras: dict[Place, PlacedLora], mesh: DeviceMesh) -> dict[str, torch.Tensor]:
    """The whole LoRAs, once their B are no longer zero."""
    generator = torch.Generator().manual_seed(5)
    for lora in loras.values():
        b = torch.randn(lora.b.shape, generator=generator, dtype=torch.float64)
        lora.b = nn.Parameter(spread(b, mesh, lora.b.placements[0]))
    return whole_loras(loras)


def merged(decoder: Decoder, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of ``decoder`` with the LoRAs in them."""
    config, found = decoder.config, {}
    for i in range(config.n_layers):
        for part in ON:
            name, section = place_of(config, i, part) or ("", 0)
            folder = "mixer" if name in ("qkv", "o") else "feedforward"
            full = f"decoder.layers.{i}.{folder}.{name}"
            weight = found.get(full, decoder.get_parameter(full.removeprefix("decoder.")))
            rows = list(weight.split(sections_of(config, i, name)))
            a, b = (tensors[f"layers.{i}.{part}.lora_{which}"] for which in "AB")
            rows[section] = rows[section] + SPEC.scale * b @ a
            found[full] = torch.cat(rows)
    return found


def loras_of_one_process(mesh: DeviceMesh) -> None:
    """Every placement on the planner's list gives the loss and the gradients of one process.

    One text of an odd number of tokens: shares of them are unequal.
    """
    config, texts = config_of(NAME), (TOKENS[:1], LABELS[:1])
    for choice in range(4):
        chosen = {place: listed(config, place, 11, 8)[choice] for place in places(config)}
        loras = placed_loras(config, SPEC, mesh, rows=11, dtype=torch.float64, chosen=chosen)
        leaves = {name: t.requires_grad_() for name, t in filled(loras, mesh).items()}
        alone = LossModel(decoder_of(config, torch.float64))  # lent weights stay in a LossModel
        wanted = functional_call(alone, merged(alone.decoder, leaves), texts)[0]
        wanted.backward()
        model = LossModel(decoder_of(config, torch.float64))
        model.requires_grad_(False)
        split(model, mesh, loras)
        with CommDebugMode() as seen:
            loss, _ = model(*texts)
        # Two sums a layer, and what the placements say; embedding and head are gathered.
        sums, gathers = 2 * config.n_layers, 2
        for candidate in chosen.values():
            kinds = [kind for kind, _ in candidate.transfers]
            sums += kinds.count("all-reduce")
            gathers += kinds.count("all-gather") + kinds.count("all-to-all")
        counted = {str(op).rpartition(".")[2]: n for op, n in seen.get_comm_counts().items()}
        assert counted["all_reduce"] == sums, (choice, counted, sums)
        assert counted["all_gather_into_tensor"] == gathers, (choice, counted, gathers)
        loss.backward()
        close(loss, wanted, 1e-10, f"placement {choice}")
        for (layer, part), lora in loras.items():
            for name, parameter in lora.named_parameters():
                what = f"layers.{layer}.{part}.lora_{name.upper()}"
                gradient = replicated(parameter.grad)
                close(gradient, leaves[what].grad, 1e-10, f"placement {choice}: {what}")


def listed(config: ModelConfig, place: Place, rows: int, n_bytes: int) -> tuple[Candidate, ...]:
    found = candidates(config, place, 3, rows=rows, element_bytes=n_bytes, mesh=Mesh(2))
    assert len(found) == 4
    return found


def places(config: ModelConfig) -> list[Place]:
    return [(i, part) for i in range(config.n_layers) for part in ON]


class Sent(TorchDispatchMode):
    """What each process sends by ring algorithms, from the sizes of what collectives move."""

    def __init__(self, processes: int) -> None:
        super().__init__()
        self.n, self.by_kind = processes, dict[str, float]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        kinds = {"all_reduce": ("all-reduce", 2), "all_gather_into_tensor": ("all-gather", 1)}
        kinds["reduce_scatter_tensor"] = ("reduce-scatter", 1)
        name = func.name().partition("::")[2].partition(".")[0]
        if func.namespace == "_c10d_functional" and name in kinds:
            kind, times = kinds[name]
            moved = out if kind == "all-gather" else args[0]
            sent = times * moved.numel() * moved.element_size() * (self.n - 1) / self.n
            self.by_kind[kind] = self.by_kind.get(kind, 0.0) + sent
        return out


def bytes_are_the_plans(mesh: DeviceMesh) -> None:
    config, rows = config_of(NAME), 22
    generator = torch.Generator().manual_seed(3)
    seen_kinds = set()
    for part in ("v", "down"):
        for candidate in listed(config, (0, part), rows, 4):
            spec = LoraSpec((part,), rank=3)
            chosen = {(i, part): candidate for i in range(config.n_layers)}
            kept = placed_loras(config, spec, mesh, rows=rows, dtype=torch.float32, chosen=chosen)
            lora = kept[0, part]
            x = torch.randn(rows, lora.a.shape[1], generator=generator)
            if lora.start is State.FEATURES:
                x = x.chunk(2, 1)[mesh.get_local_rank()]
            with Sent(2) as sent:
                lora(x, rows)
            planned: dict[str, float] = {}
            for step in candidate.steps:
                # Between CPUs there is no all-to-all: torch gathers, and each sends to all.
                gathers = step.what == "all-to-all"
                if step.bytes:
                    kind = "all-gather" if gathers else step.what
                    planned[kind] = planned.get(kind, 0.0) + step.bytes * (2 if gathers else 1)
                    seen_kinds.add(step.what)
            assert sent.by_kind == planned, (str(candidate), sent.by_kind, planned)
    assert seen_kinds == {"all-reduce", "all-gather", "all-to-all", "reduce-scatter"}


def kept_by_two_read_by_one(ranks: Ranks, folder: Path) -> None:
    """A decoder and its LoRAs; one process finds them whole, and two find them again."""
    config = config_of("hybrid")
    spec = LoraSpec(("q", "r", "o"), rank=2)
    loras = placed_loras(config, spec, ranks.tensor, rows=8, dtype=torch.float32)
    model = LossModel(decoder_of(config, torch.float32))
    ranks.share(model, loras)

    def tensors() -> dict[str, torch.Tensor]:
        kept = dict(model.decoder.named_parameters())
        kept |= {f"lora.{n}": t for n, t in loras_in(model).items()}
        return {f"parameter.{name}": t.detach() for name, t in kept.items()}

    keeper = ranks.keeper(folder, 1, config)
    keeper.begin(Checkpoint(1, {}, tensors()))
    keeper.finish()
    (path,) = checkpoints(folder)
    alone = read_checkpoint(path).tensors
    for name, parameter in decoder_of(config, torch.float32).named_parameters():
        assert torch.equal(alone[f"parameter.{name}"], parameter), name
    whole = {name: replicated(t) for name, t in tensors().items() if "lora" in name}
    for name, tensor in whole.items():
        assert torch.equal(alone[name], tensor), name
    before = {name: tensor.to_local().clone() for name, tensor in tensors().items()}
    for tensor in tensors().values():
        tensor.to_local().zero_()
    keeper.read(path, tensors)
    for name, tensor in tensors().items():
        assert torch.equal(tensor.to_local(), before[name]), name


def loras_in(model: LossModel) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if ".loras." in name}


def of_two(folder: Path) -> None:
    with joined(1, "cpu", tensor=2) as ranks:
        for name in MODELS:
            of_one_process(ranks.tensor, name, torch.float64, 1e-10)
        of_one_process(ranks.tensor, "hybrid", torch.float32, 1e-5)
        loras_of_one_process(ranks.tensor)
        bytes_are_the_plans(ranks.tensor)
        kept_by_two_read_by_one(ranks, folder)


# --- with FSDP2 in the other dimension ------------------------------------------------------------
def tuned_by_four(home: Path) -> None:
    """Two steps of AdamW on LoRAs: what one process makes of all rows, as an adapter to serve."""
    config, settings = config_of(NAME), AdamW(learning_rate=0.05, epsilon=1e-4)
    rows, labels = TOKENS.repeat(2, 1), LABELS.repeat(2, 1)
    rows[1] = rows[1].flip(0)
    with joined(1, "cpu", tensor=2) as ranks:
        assert (ranks.readers, ranks.reader) == (2, ranks.rank // 2)
        own = slice(2 * ranks.reader, 2 * ranks.reader + 2)
        model = LossModel(decoder_of(config, torch.float32), recompute="layer")
        first = ranks.rank == 0
        batches = [(rows[own], labels[own])] * 2
        fresh = placed_loras(config, SPEC, ranks.tensor, rows=22, dtype=torch.float32, seed=9)
        begun = whole_loras(fresh)
        found, losses = tune(model, ranks, SPEC, batches, settings=settings, seed=9)
    if not first:
        return
    leaves = {name: t.clone().requires_grad_() for name, t in begun.items()}
    optimizer = torch.optim.AdamW(
        leaves.values(), lr=0.05, betas=settings.betas, eps=1e-4, weight_decay=0.1
    )
    for step in range(2):
        alone = LossModel(decoder_of(config, torch.float32))
        total, count = functional_call(alone, merged(alone.decoder, leaves), (rows, labels))
        optimizer.zero_grad()
        (total / count).backward()
        nn.utils.clip_grad_norm_(leaves.values(), 1.0)
        optimizer.step()
        close(torch.tensor(losses[step]), (total / count).detach(), 1e-5, f"step {step}")
    assert found.keys() == leaves.keys()
    bypass = BypassSpec("lora", SPEC.on, SPEC.rank, alpha=SPEC.alpha)
    assert bypass.scale == SPEC.scale
    write_adapter(home / "adapter", [bypass], found, config, "tiny")
    _, served = from_peft(*read_adapter(home / "adapter"), config)
    for name, tensor in found.items():
        close(tensor, leaves[name].detach(), 1e-4, name)
        assert torch.equal(served[name], tensor), name


def begun_by_four(config: Path, runs: Path) -> None:
    asked = itertools.count()
    train(read_config(config, ["train.steps=4"]), runs=runs, stop=lambda: next(asked) == 2)


if __name__ == "__main__":
    home = Path(sys.argv[1])
    # What the processes would each import for themselves, where it is first used.
    import torch._dynamo
    from transformers import PreTrainedTokenizerFast  # noqa: F401

    together(2, partial(of_two, home / "kept"))
    together(4, partial(tuned_by_four, home))
    together(4, partial(begun_by_four, home / "small.toml", home / "runs"))
