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
from hfgpt.evaluation.fast_generation import speed_up_generation

PROMPT, NEW_TOKENS = 16, 64
SHAPES = [replace(shape, context=max(shape.context, 256)) for shape in (SMALL, BABY, GPT2_SMALL)]
BATCHES = (1, 16)


def generate(model: nn.Module, ids: torch.Tensor, new_tokens: int, do_sample: bool) -> torch.Tensor:
    """The ids (B, T), followed by new ones (B, T + new_tokens)."""
    if not hasattr(model, "prepare_inputs_for_generation"):  # nanoGPT, which always samples
        return model.generate(ids, new_tokens, top_k=50 if do_sample else 1)
    options = {"do_sample": True, "top_k": 50} if do_sample else {"do_sample": False}
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, min_new_tokens=new_tokens, **options
    )


def measure_decoding(
    shape: Shape, bandwidth: float, device: torch.device, nanogpt: Path | None, advance: Callable
) -> list[Comparison]:
    """Compares the speed of `generate` in float32, with its default settings.

    Args:
        shape: Model.
        bandwidth: Bytes per second that this machine reads.
        device: Device.
        nanogpt: A checkout of nanoGPT.
        advance: Called after each measurement.

    Returns:
        For one row, greedy and sampled, the first token, and the same for 16 rows; on a CPU, also with
        `speed_up_generation`, in float32 and in float16.
    """
    models = {name: model.eval() for name, model in build_models(shape, device, nanogpt).items()}
    weights = sum(weight.nbytes for weight in models[HFGPT].parameters())
    found = []

    def compare(case: str, models: dict[str, nn.Module], rows: int, new_tokens: int, do_sample: bool, size: int):
        ids = torch.randint(shape.vocabulary, (rows, PROMPT), device=device)

        def measure(model: nn.Module, new_tokens: int) -> float:
            begun = time.perf_counter()
            generated = generate(model, ids, new_tokens, do_sample)
            synchronize(device)
            seconds = time.perf_counter() - begun
            assert generated.shape[1] == PROMPT + new_tokens
            return rows * new_tokens / seconds if new_tokens > 1 else 1000 * seconds

        for model in models.values():
            measure(model, min(new_tokens, 4))  # warms up
        values = measure_in_turns(
            {name: partial(measure, model, new_tokens) for name, model in models.items()}, advance
        )
        what = f"{case}, {shape.name}, {rows} row{'s' if rows > 1 else ''}"
        is_time = new_tokens == 1
        limit = None if is_time else rows * bandwidth / size
        found.append(Comparison("decode", what, "ms" if is_time else "tokens/s", values, is_time, limit))

    for rows in BATCHES:
        # nanoGPT has no cache: its 16 rows would take minutes.
        chosen = {name: model for name, model in models.items() if name != NANOGPT or rows == 1}
        compare("greedy", chosen, rows, NEW_TOKENS, False, weights)
        compare("sampled", chosen, rows, NEW_TOKENS, True, weights)
        compare("first token", chosen, rows, 1, False, weights)
    if device.type == "cpu":
        models.pop(NANOGPT, None)
        for case, half in (("fast loop", False), ("--fast", True)):
            models[HFGPT] = speed_up_generation(models[HFGPT], half)
            for name, do_sample in (("greedy", False), ("sampled", True)):
                compare(f"{name}, {case}", models, 1, NEW_TOKENS, do_sample, weights // 2 if half else weights)
    return found
