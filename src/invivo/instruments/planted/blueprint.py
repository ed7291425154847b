"""Building blocks: heads and tables written into the weights of a Llama-type decoder.

The residual stream is divided into blocks: "token" (one-hot), "const" (always 1), and one for
everything that a head or an MLP writes. All tokens carry the same number of unit vectors, so that
the RMS of the stream is a known constant at every norm and is divided out in the weights. Attention
is so sharp that what lies between two tokens is below 1e-9.

With the base of the rotary embedding at 10^(D / 2) the first pair of a head turns by 1 radian a
position, the next by 0.1, and those from the seventh on by a millionth. Queries that look back a
number of tokens live on the first three pairs, queries that match content on those from the
seventh on.

At the end heads and neurons are permuted and the whole stream is turned by a random orthogonal
matrix, with which RMS norm of unit weight commutes: no mechanism is aligned with any axis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from invivo.errors import InvalidRequest
from invivo.instruments.planted.truth import Head
from invivo.instruments.planted.words import START, Words
from invivo.models.config import LayerConfig, ModelConfig, RopeConfig
from invivo.models.decoder import Decoder, Layer
from invivo.models.feedforward.mlp import MLP

_TURNING = 6  # pairs of a head left to positions
_POINTING = (0, 1, 2)  # those of them that are used
_POINT_GAIN = 200.0  # the second best position is at least 0.15 of this behind
_MATCH_GAIN = 60.0  # a match scores this, the start token half, everything else nothing
_THRESHOLD = 30.0  # SiLU is the identity above this and zero below its negative, to 1e-11
_CODE = 4  # numbers in which a distractor writes a token's identity
_EPS = 1e-5


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large a planted model is: words of its vocabulary, layers, heads, key heads."""

    n_symbols: int = 12
    n_layers: int = 3
    n_heads: int = 4
    n_kv_heads: int = 2

    def __post_init__(self) -> None:
        limits = (
            ("n_symbols", 8, 48),
            ("n_layers", 2, 64),
            ("n_kv_heads", 2, 64),
            ("n_heads", 2, 256),
        )
        for name, low, high in limits:
            if not low <= getattr(self, name) <= high:
                raise InvalidRequest(
                    f"must be between {low} and {high}",
                    field=f"sizes.{name}",
                    given=getattr(self, name),
                )
        if self.n_heads % self.n_kv_heads:
            raise InvalidRequest(
                "must be a multiple of the key heads", field="sizes.n_heads", given=self.n_heads
            )

    @property
    def share(self) -> int:
        """Query heads that read one key head."""
        return self.n_heads // self.n_kv_heads


@dataclass(slots=True)
class PlannedHead:
    """A query head: ``query`` [D, d] reads the stream, ``write`` [d, D] writes to it.

    Attributes:
        power: squared norm of what it adds to the stream, whatever the token.
    """

    role: str | None
    query: torch.Tensor
    write: torch.Tensor
    power: float


@dataclass(slots=True)
class PlannedGroup:
    """A key head, ``key`` and ``value`` [D, d], with the query heads planned for it so far."""

    key: torch.Tensor
    value: torch.Tensor
    heads: list[PlannedHead] = field(default_factory=list)


class Blueprint:
    """A model being planned.

    Args:
        blocks: name and width of the blocks that the mechanism writes; "token" and "const" are
            there anyway.
        distractor_size: norm of what heads without a role write.
    """

    def __init__(
        self,
        sizes: Sizes,
        blocks: Mapping[str, int],
        *,
        generator: torch.Generator,
        distractor_size: float = 1.0,
    ) -> None:
        self.sizes = sizes
        self.words = Words(sizes.n_symbols)
        self.generator = generator
        self.distractor_size = distractor_size
        widths = {"token": self.words.size, "const": 1, **blocks}
        for i in range(sizes.n_layers):
            widths |= {f"noise.{i}.{h}": _CODE for h in range(sizes.n_heads)}
            widths[f"noise.{i}.mlp"] = _CODE
        self._start, at = {}, 0
        for name, width in widths.items():
            self._start[name] = at
            at += width
        self._width = widths
        self.d_model = -(-at // 8) * 8
        # Room for the words and the start token on the pairs that do not turn.
        self.head_dim = -(-2 * (_TURNING + -(-self.words.size // 2)) // 8) * 8
        self.groups: dict[int, list[PlannedGroup]] = {i: [] for i in range(sizes.n_layers)}

    # Parts of heads. D = head_dim, d = d_model, V = vocabulary.

    def block(self, name: str) -> slice:
        return slice(self._start[name], self._start[name] + self._width[name])

    def zeros(self, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.float64)

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=self.generator)

    def draw(self, n: int) -> int:
        """A random number below ``n``."""
        return int(torch.randint(n, (), generator=self.generator))

    def look_back(self, offset: int) -> torch.Tensor:
        """Query [D, d]: the token ``offset`` places back, or the first one."""
        query = self.zeros(self.head_dim, self.d_model)
        for pair in _POINTING:
            angle = torch.tensor(-offset * 10.0**-pair, dtype=torch.float64)
            query[pair, self.block("const")] = _POINT_GAIN * torch.cos(angle)
            query[self.head_dim // 2 + pair, self.block("const")] = _POINT_GAIN * torch.sin(angle)
        return query

    def match_token(self) -> torch.Tensor:
        """Query [D, d]: where the key's content is the own token; else the start token."""
        query = self.zeros(self.head_dim, self.d_model)
        token = self.block("token").start
        for symbol in range(1, self.words.size):
            query[self._content[symbol], token + symbol] = _MATCH_GAIN
        query[self._content[START], self.block("const")] = _MATCH_GAIN / 2
        return query

    def place_key(self) -> torch.Tensor:
        """Key [D, d] that queries of :meth:`look_back` find."""
        key = self.zeros(self.head_dim, self.d_model)
        key[list(_POINTING), self.block("const")] = 1.0
        return key

    def content_key(self, block: str) -> torch.Tensor:
        """Key [D, d] that queries of :meth:`match_token` find: the word in ``block``."""
        key = self.zeros(self.head_dim, self.d_model)
        start = self.block(block).start
        for symbol in range(1, self.words.size):
            key[self._content[symbol], start + symbol] = 1.0
        key[self._content[START], self.block("token").start + START] = 1.0
        return key

    @property
    def _content(self) -> list[int]:
        """The dimensions of a head that carry content: both numbers of each pair."""
        half = self.head_dim // 2
        return [*range(_TURNING, half), *range(half + _TURNING, self.head_dim)]

    def token_value(self) -> torch.Tensor:
        """Value [D, d]: the identity of the token."""
        value = self.zeros(self.head_dim, self.d_model)
        value[: self.words.size, self.block("token")] = torch.eye(
            self.words.size, dtype=torch.float64
        )
        return value

    def write(self, block: str, table: torch.Tensor) -> torch.Tensor:
        """Write [d, D]: column t of ``table`` [width, V] for a value that is token t."""
        out = self.zeros(self.d_model, self.head_dim)
        out[self.block(block), : self.words.size] = table
        return out

    def copy(self, size: float) -> torch.Tensor:
        """Table [V, V] that gives each token back, ``size`` times."""
        return size * torch.eye(self.words.size, dtype=torch.float64)

    def code(self, size: float) -> torch.Tensor:
        """Table [4, V] of random directions, all of norm ``size``."""
        table = self.random(_CODE, self.words.size)
        scaled: torch.Tensor = size * table / table.norm(dim=0)
        return scaled

    # Putting heads into layers.

    def add_group(
        self, layer: int, key: torch.Tensor, value: torch.Tensor, heads: Sequence[PlannedHead]
    ) -> None:
        """Plan a key head of ``layer`` with some of its query heads."""
        group = PlannedGroup(key, value, list(heads))
        assert len(group.heads) <= self.sizes.share
        self.groups[layer].append(group)
        assert len(self.groups[layer]) <= self.sizes.n_kv_heads

    def _complete(self) -> None:
        """Fill every layer with heads that write something nobody reads."""
        for layer, groups in self.groups.items():
            while len(groups) < self.sizes.n_kv_heads:
                groups.append(PlannedGroup(self.place_key(), self.token_value()))
            number = 0
            for group in groups:
                silent = not bool(group.value.any())
                while len(group.heads) < self.sizes.share:
                    size = 0.0 if silent else self.distractor_size
                    table = self.code(self.distractor_size)
                    group.heads.append(
                        PlannedHead(
                            role=None,
                            query=self.look_back(self.draw(4)),
                            write=self.write(f"noise.{layer}.{number}", table),
                            power=size**2,
                        )
                    )
                    number += 1

    def build(self, read: Mapping[str, float], prior: float) -> tuple[Decoder, dict[str, Head]]:
        """The model, and where the roles ended up.

        Args:
            read: how much of each block the unembedding reads as words.
            prior: size of a random table from the last token to the logits, which decides where
                the mechanism does not.
        """
        self._complete()
        sizes, d, n_words = self.sizes, self.d_model, self.words.size
        config = ModelConfig(
            family="llama",
            vocab_size=n_words,
            d_model=d,
            n_heads=sizes.n_heads,
            n_kv_heads=sizes.n_kv_heads,
            head_dim=self.head_dim,
            d_ff=-(-n_words // 8) * 8,
            max_positions=64,
            layers=(LayerConfig(),) * sizes.n_layers,
            ropes=(RopeConfig(10.0 ** (self.head_dim // 2), self.head_dim),),
            norm_eps=_EPS,
            bos_token_id=START,
        )
        decoder = Decoder(config, dtype=torch.float64)
        turn = torch.linalg.qr(self.random(d, d))[0]  # the stream becomes turn @ stream
        embedding = self.zeros(n_words, d)
        embedding[:, self.block("token")] = torch.eye(n_words, dtype=torch.float64)
        embedding[:, self.block("const")] = 1.0
        decoder.embed.copy_(embedding @ turn.T)
        power = 2.0
        roles: dict[str, Head] = {}
        for i, layer in enumerate(decoder.layers):
            assert isinstance(layer, Layer)
            assert isinstance(layer.feedforward, MLP)
            assert layer.norm1 is not None
            assert layer.norm2 is not None
            layer.norm1.weight.fill_(1.0)
            layer.norm2.weight.fill_(1.0)
            qkv, o, written = self._attention(i, roles)
            layer.mixer.qkv.copy_(qkv @ turn.T / self._scale(power))
            layer.mixer.o.copy_(turn @ o)
            power += written
            gate_up, down = self._lookup(i, config.d_ff)
            layer.feedforward.gate_up.copy_(gate_up @ turn.T / self._scale(power))
            layer.feedforward.down.copy_(turn @ down)
            power += 1.0
        decoder.final_norm.weight.fill_(1.0)
        head = self.zeros(n_words, d)
        for block, gain in read.items():
            head[1:, self.block(block)] = gain * torch.eye(n_words, dtype=torch.float64)[1:]
        head[1:, self.block("token")] += prior * self.random(n_words - 1, n_words)
        assert decoder.head is not None
        decoder.head.copy_(head @ turn.T / self._scale(power))
        return decoder.eval(), roles

    def _scale(self, power: float) -> float:
        """The factor of a norm when the stream has this squared length."""
        return float((power / self.d_model + _EPS) ** -0.5)

    def _attention(
        self, layer: int, roles: dict[str, Head]
    ) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Weights [(H + 2 G) D, d] and [d, H D] of a layer, and the power of what it writes."""
        share, written = self.sizes.share, 0.0
        queries: list[torch.Tensor] = []
        keys: list[torch.Tensor] = []
        values: list[torch.Tensor] = []
        outs: list[torch.Tensor] = []
        for g in torch.randperm(self.sizes.n_kv_heads, generator=self.generator).tolist():
            group = self.groups[layer][g]
            for h in torch.randperm(share, generator=self.generator).tolist():
                head = group.heads[h]
                if head.role is not None:
                    roles[head.role] = Head(layer, len(queries), len(keys))
                queries.append(head.query * self.head_dim**0.5)
                outs.append(head.write)
                written += head.power
            keys.append(group.key)
            values.append(group.value)
        return torch.cat([*queries, *keys, *values]), torch.cat(outs, dim=1), written

    def _lookup(self, layer: int, n_neurons: int) -> tuple[torch.Tensor, torch.Tensor]:
        """An MLP with a neuron for each token, which writes a direction nobody reads."""
        gate = self.zeros(n_neurons, self.d_model)
        up, down = gate.clone(), self.zeros(self.d_model, n_neurons)
        # Neurons without a token have the gate of a token that does not exist: closed for ever.
        gate[:, self.block("const")] = -_THRESHOLD
        up[:, self.block("const")] = 1.0
        order = torch.randperm(n_neurons, generator=self.generator)[: self.words.size]
        for token, neuron in enumerate(order.tolist()):
            gate[neuron, self.block("token").start + token] = 2 * _THRESHOLD
        down[self.block(f"noise.{layer}.mlp"), order] = self.code(1.0) / _THRESHOLD
        return torch.cat((gate, up)), down
