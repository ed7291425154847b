"""The decoder on a GPU at the size of Llama-3.1-8B (random bf16 weights), beside transformers.

    PYTHONPATH=src python bench/engine_gpu.py [--out FILE] [--without-transformers]

A decode step is what the engine launches for it: filling the static buffers, the graph of forward
pass and logits, and the greedy choice; all rows have a context of 576 tokens, or the one named.
Prefill is one forward pass over a prompt, and the logits of its last row. Floors: a decode step
reads all weights but the embedding once and the keys and values of every row; prefill does two
operations a weight and token and the attention's. transformers runs its own generate (static
batch, dynamic cache, SDPA), its step is the time of 24 new tokens less that of 8, over 16.

The rows named "engine" are the whole engine, scheduler and sampling included: as many requests at
once, 512 random prompt tokens each and 128 greedy new ones. A decode step is the median time of an
iteration in which all of them decode; prefill is the time until the last has its first token.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from functools import partial
from pathlib import Path

import torch

from gpu_timing import Ceilings, Row, event_ms, measure_ceilings, report
from invivo.engine.engine import Engine, EngineConfig
from invivo.engine.graphs import DecodeGraphs
from invivo.engine.types import Output, Request, SamplingParams
from invivo.kernels.paging import PagedLayout, blocks_needed, contiguous_layout
from invivo.models.cache import KVCache, allocate_kv_cache
from invivo.models.config import ModelConfig
from invivo.models.decoder import Decoder
from invivo.models.hub_config import config_from_hf
from invivo.models.load import LoadedModel, random_model

BLOCK = 16
CONTEXT = 576
DECODES = ((1, CONTEXT), (8, CONTEXT), (32, CONTEXT), (128, CONTEXT), (256, CONTEXT), (32, 4096))
PREFILLS = ((8192,), (2048,), (512,) * 4)
LLAMA_8B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(__file__).parent / "results" / "engine-h200.json"
    parser.add_argument("--out", type=Path, default=default)
    parser.add_argument("--without-transformers", action="store_true")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench/engine_gpu.py needs a CUDA device")
    ceilings = measure_ceilings()
    config = config_from_hf(LLAMA_8B)
    with torch.inference_mode():
        decoder = random_model(config, device="cuda", dtype=torch.bfloat16)
        rows = time_decodes(decoder, ceilings) + time_prefills(decoder, ceilings)
        torch.cuda.empty_cache()
        rows += time_engine(decoder, ceilings)
        del decoder
        gc.collect()
        torch.cuda.empty_cache()
        if not args.without_transformers:
            add_transformers(rows)
    report(rows, ceilings, args.out)


def read_weights(config: ModelConfig) -> int:
    """Weights that a forward pass multiplies with: all but the embedding table."""
    head = config.vocab_size * config.d_model
    qkv = (config.n_heads + 2 * config.n_kv_heads) * config.head_dim
    layer = config.d_model * (qkv + config.n_heads * config.head_dim + 3 * config.d_ff)
    return config.n_layers * layer + head


def kv_bytes(config: ModelConfig) -> int:
    """Bytes of one token's keys and values in bf16."""
    return 4 * config.n_layers * config.n_kv_heads * config.head_dim


# --- invivo ---------------------------------------------------------------------------------
def time_decodes(decoder: Decoder, ceilings: Ceilings) -> list[Row]:
    config = decoder.config
    most_blocks = max(rows * -(-context // BLOCK) for rows, context in DECODES) + 1
    cache = allocate_kv_cache(
        config, n_blocks=most_blocks, block_size=BLOCK, device="cuda", dtype=torch.bfloat16
    )
    for tensor in (cache.k, cache.v):
        tensor.normal_()
    graphs = DecodeGraphs(
        decoder,
        cache,
        None,
        max_rows=max(rows for rows, _ in DECODES),
        max_blocks=max(-(-context // BLOCK) for _, context in DECODES),
    )
    rows = []
    for batch, context in DECODES:
        layout = decode_layout(batch, context)
        tokens = torch.randint(0, config.vocab_size, (batch,), device="cuda")
        step = partial(decode_step, graphs, tokens, layout)
        n_bytes = 2 * read_weights(config) + batch * context * kv_bytes(config)
        n_flops = 2 * read_weights(config) * batch
        ms = event_ms(step, 30)
        rows.append(
            Row(
                f"decode B={batch} context {context}",
                ms,
                ceilings.floor_ms(n_bytes, n_flops),
                error=check_decode(decoder, cache, graphs, tokens, layout),
                note=f"{1e3 * batch / ms:,.0f} tok/s",
            )
        )
    return rows


def decode_step(graphs: DecodeGraphs, tokens: torch.Tensor, layout: PagedLayout) -> None:
    tokens.copy_(torch.argmax(graphs.run(tokens, layout), dim=-1))


def check_decode(
    decoder: Decoder,
    cache: KVCache,
    graphs: DecodeGraphs,
    tokens: torch.Tensor,
    layout: PagedLayout,
) -> float:
    """Logits of the replayed graph against the same step launched kernel by kernel."""
    direct = decoder.logits(decoder(tokens, layout, cache)).double()
    return float((graphs.run(tokens, layout).double() - direct).norm() / direct.norm())


def decode_layout(batch: int, context: int) -> PagedLayout:
    """The last token of ``batch`` sequences of ``context`` tokens in shuffled blocks."""
    width = -(-context // BLOCK)
    table = (torch.randperm(batch * width) + 1).to(torch.int32).view(batch, width).cuda()
    last = context - 1
    slots = table[:, last // BLOCK].long() * BLOCK + last % BLOCK
    return PagedLayout(
        positions=torch.full((batch,), last, device="cuda"),
        slots=slots,
        span_start=torch.arange(batch + 1, dtype=torch.int32, device="cuda"),
        kv_len=torch.full((batch,), context, dtype=torch.int32, device="cuda"),
        block_table=table,
        block_size=BLOCK,
        n_decode=batch,
        max_query=1,
        max_kv=context,
        span_start_host=list(range(batch + 1)),
        kv_len_host=[context] * batch,
    )


def time_prefills(decoder: Decoder, ceilings: Ceilings) -> list[Row]:
    config = decoder.config
    rows = []
    for lengths in PREFILLS:
        layout = contiguous_layout(list(lengths), block_size=BLOCK, device="cuda")
        cache = allocate_kv_cache(
            config,
            n_blocks=blocks_needed(list(lengths), BLOCK),
            block_size=BLOCK,
            device="cuda",
            dtype=torch.bfloat16,
        )
        n_tokens = sum(lengths)
        tokens = torch.randint(0, config.vocab_size, (n_tokens,), device="cuda")
        ms = event_ms(partial(prefill, decoder, tokens, layout, cache), 10)
        head = config.vocab_size * config.d_model
        pairs = sum(n * (n + 1) // 2 for n in lengths)
        n_flops = 2 * (read_weights(config) - head) * n_tokens
        n_flops += 4 * config.n_layers * config.n_heads * config.head_dim * pairs
        rows.append(
            Row(
                f"prefill {' + '.join(map(str, lengths))}",
                ms,
                ceilings.floor_ms(0, n_flops),
                note=f"{1e3 * n_tokens / ms:,.0f} tok/s",
            )
        )
    return rows


def prefill(
    decoder: Decoder, tokens: torch.Tensor, layout: PagedLayout, cache: KVCache
) -> torch.Tensor:
    hidden = decoder(tokens, layout, cache)
    return decoder.logits(hidden[layout.span_start[1:].long() - 1])


def time_engine(decoder: Decoder, ceilings: Ceilings) -> list[Row]:
    config = decoder.config
    model = LoadedModel(
        name="llama-8b-shape",
        path=Path(),
        config=config,
        decoder=decoder,
        tokenizer=None,
        fingerprint="",
    )
    start = time.perf_counter()
    # The same prompts twice: with the prefix cache there would be no second prefill.
    engine = Engine(model, EngineConfig(max_model_len=4096, prefix_cache=False))
    ready_s = time.perf_counter() - start
    rows = [Row("engine start, all decode graphs", 1e3 * ready_s, 0.0)]
    for batch in (1, 32, 128, 256):
        serve(engine, batch)  # libraries choose and load their kernels
        prefill_ms, step_ms = serve(engine, batch)
        n_bytes = 2 * read_weights(config) + batch * CONTEXT * kv_bytes(config)
        n_flops = 2 * read_weights(config) * batch
        rows.append(
            Row(
                f"engine decode B={batch} context 512 to 640",
                step_ms,
                ceilings.floor_ms(n_bytes, n_flops),
                note=f"{1e3 * batch / step_ms:,.0f} tok/s",
            )
        )
        rows.append(
            Row(
                f"engine prefill {batch} x 512",
                prefill_ms,
                ceilings.floor_ms(2 * read_weights(config), n_flops * 512),
                note=f"{1e3 * 512 * batch / prefill_ms:,.0f} tok/s",
            )
        )
    engine.close()
    return rows


def serve(engine: Engine, batch: int, n_prompt: int = 512, n_new: int = 128) -> tuple[float, float]:
    """Milliseconds until all have their first token, and of a step in which all decode."""
    seen = [0] * batch
    done = [False] * batch

    def listen(index: int, output: Output) -> None:
        seen[index] += len(output.tokens)
        done[index] = output.final

    generator = torch.Generator().manual_seed(batch)
    vocabulary = engine.model.config.vocab_size
    prompts = torch.randint(0, vocabulary, (batch, n_prompt), generator=generator).tolist()
    params = SamplingParams(temperature=0.0, max_tokens=n_new, ignore_eos=True)
    start = time.perf_counter()
    for i, prompt in enumerate(prompts):
        request = Request(id=f"b{batch}-{i}", tokens=tuple(prompt), params=params)
        engine.submit(request, partial(listen, i))
    prefill_ms = 0.0
    steps = []
    while not all(done):
        before = time.perf_counter()
        engine.step()
        now = time.perf_counter()
        if not prefill_ms and all(seen):
            prefill_ms = 1e3 * (now - start)
        elif prefill_ms and max(seen) < n_new:
            steps.append(1e3 * (now - before))
    return prefill_ms, statistics.median(steps)


# --- transformers ---------------------------------------------------------------------------
def add_transformers(rows: list[Row]) -> None:
    """Fill ``other_ms`` of the rows that transformers can run too."""
    from transformers import LlamaConfig, LlamaForCausalLM

    raw = {k: v for k, v in LLAMA_8B.items() if k not in ("model_type", "architectures")}
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(LlamaConfig(**raw)).eval()
    torch.set_default_dtype(torch.float32)
    by_name = {row.what: row for row in rows}
    for batch in (1, 32, 128):
        row = by_name[f"decode B={batch} context {CONTEXT}"]
        row.other_ms = transformers_step_ms(model, batch)
    ids = torch.randint(0, 128000, (1, 8192), device="cuda")
    by_name["prefill 8192"].other_ms = event_ms(
        partial(model, input_ids=ids, use_cache=True, logits_to_keep=1), 5
    )


def transformers_step_ms(model: torch.nn.Module, batch: int) -> float:
    ids = torch.randint(0, 128000, (batch, CONTEXT - 16), device="cuda")
    mask = torch.ones_like(ids)
    seconds = []
    for n_new in (4, 8, 24):  # the first warms up
        torch.cuda.synchronize()
        start = time.perf_counter()
        model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=n_new,
            min_new_tokens=n_new,
            do_sample=False,
            pad_token_id=0,
        )
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 1e3 * (seconds[2] - seconds[1]) / 16


if __name__ == "__main__":
    main()
