"""Generation: new tokens per second, greedy and sampled, and the time to the first one."""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from hfgpt.bench.measuring import HFGPT, NANOGPT, Comparison, measure_in_turns, synchronize
from hfgpt.bench.models import BABY, GPT2_SMALL, SMALL, Shape, build_models

PROMPT, NEW_TOKENS = 16, 64
SHAPES = [replace(shape, context=max(shape.context, 256)) for shape in (SMALL, BABY, GPT2_SMALL)]
BATCHES = (1, 16)


def generate(model: nn.Module, ids: torch.Tensor, new_tokens: int, do_sample: bool) -> torch.Tensor:
    """The ids (B, T) and as many new ones."""
    if not hasattr(model, "prepare_inputs_for_generation"):  # nanoGPT, which always samples
        return model.generate(ids, new_tokens, top_k=50 if do_sample else 1)
    options = {"do_sample": True, "top_k": 50} if do_sample else {"do_sample": False}
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, min_new_tokens=new_tokens, **options
    )


def measure_decoding(
    shape: Shape, bandwidth: float, device: torch.device, nanogpt: Path | None, advance: Callable
) -> list[Comparison]:
    """Compares generation in float32, with the default settings of `generate`.

    Args:
        shape: Model.
        bandwidth: Bytes per second that this machine reads.
        device: Device.
        nanogpt: A checkout of nanoGPT.
        advance: Called after each measurement.

    Returns:
        For one row, greedy and sampled, the first token, and the same for 16 rows.
    """
    models = {name: model.eval() for name, model in build_models(shape, device, nanogpt).items()}
    weights = sum(weight.nbytes for weight in models[HFGPT].parameters())
    found = []
    for rows in BATCHES:
        ids = torch.randint(shape.vocabulary, (rows, PROMPT), device=device)

        def measure(name: str, new_tokens: int, do_sample: bool, ids: torch.Tensor = ids) -> float:
            begun = time.perf_counter()
            generated = generate(models[name], ids, new_tokens, do_sample)
            synchronize(device)
            seconds = time.perf_counter() - begun
            assert generated.shape[1] == PROMPT + new_tokens
            return len(ids) * new_tokens / seconds if new_tokens > 1 else 1000 * seconds

        # nanoGPT has no cache: its 16 rows would take minutes.
        chosen = [name for name in models if name != NANOGPT or rows == 1]
        cases = [("greedy", NEW_TOKENS, False), ("sampled", NEW_TOKENS, True), ("first token", 1, False)]
        for case, new_tokens, do_sample in cases:
            for name in chosen:
                measure(name, min(new_tokens, 4), do_sample)  # warms up
            values = measure_in_turns(
                {name: partial(measure, name, new_tokens, do_sample) for name in chosen}, advance
            )
            what = f"{case}, {shape.name}, {rows} row{'s' if rows > 1 else ''}"
            is_time = new_tokens == 1
            limit = None if is_time else rows * bandwidth / weights
            found.append(Comparison("decode", what, "ms" if is_time else "tokens/s", values, is_time, limit))
    return found
