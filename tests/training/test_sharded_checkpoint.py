"""Checkpoints written in the background: what was begun is what is kept."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.tensor import Shard, distribute_tensor

from invivo.errors import InvalidRequest
from invivo.training.checkpoint import Checkpoint, checkpoints, read_checkpoint
from invivo.training.parallel import Ranks, joined
from invivo.training.shape import shape_of

CONFIG = shape_of(
    {"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    | {"intermediate_size": 8},
    length=8,
    vocab_size=16,
    end=0,
)


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranks]:
    """A group of this process alone."""
    group = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in group.items():
        monkeypatch.setenv(name, value)
    with joined(1, "cpu") as found:
        yield found


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Nothing is written before this is set."""
    event, write = threading.Event(), HuggingFaceStorageWriter.write_data

    def waiting(self: HuggingFaceStorageWriter, *plan: Any) -> Any:
        event.wait()
        return write(self, *plan)

    monkeypatch.setattr(HuggingFaceStorageWriter, "write_data", waiting)
    return event


def test_training_may_go_on_while_a_checkpoint_is_written(
    tmp_path: Path, ranks: Ranks, held: threading.Event
) -> None:
    plain = torch.arange(6.0)
    sharded = distribute_tensor(torch.arange(8.0).view(4, 2), ranks.mesh, [Shard(0)])
    tensors = {"plain": plain, "sharded": sharded}
    wanted = {"plain": plain.clone(), "sharded": sharded.full_tensor().clone()}
    keeper = ranks.keeper(tmp_path, 1, CONFIG)
    keeper.begin(Checkpoint(3, {"tokens": 5}, tensors))
    try:
        assert not keeper.is_written
        assert checkpoints(tmp_path) == []
        plain.zero_()
        sharded.to_local().zero_()
    finally:
        held.set()
    assert keeper.finish() == 3
    assert keeper.finish() is None
    (path,) = checkpoints(tmp_path)
    found = read_checkpoint(path)
    assert (found.step, found.state["tokens"]) == (3, 5)
    assert found.tensors.keys() == wanted.keys()
    for name, tensor in found.tensors.items():
        assert torch.equal(tensor, wanted[name]), name
    again = keeper.read(path, lambda: tensors)
    assert again.step == 3
    assert torch.equal(sharded.full_tensor(), wanted["sharded"])
    assert torch.equal(plain, wanted["plain"])


def test_a_part_that_is_missing_is_said(
    tmp_path: Path, ranks: Ranks, held: threading.Event
) -> None:
    held.set()
    keeper = ranks.keeper(tmp_path, 1, CONFIG)
    keeper.begin(Checkpoint(1, {}, {"a": torch.ones(2)}))
    keeper.finish()
    (path,) = checkpoints(tmp_path)
    with pytest.raises(InvalidRequest, match="cannot be read"):
        keeper.read(path, lambda: {"a": torch.ones(2), "b": torch.ones(3)})
