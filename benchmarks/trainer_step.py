"""Time of a Trainer step relative to the same step in a bare loop, for the model of the recipe shakespeare-char.

    python benchmarks/trainer_step.py

Both train the same model with the same optimizer, schedule and clipping on the same blocks, alternating
several times; the median of the ratios is printed, since machine speed drifts. A step is timed from the end of one
step to the end of the next.
"""

import itertools
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader, RandomSampler
from transformers import TrainerCallback, default_data_collator, get_linear_schedule_with_warmup
from transformers.utils import logging

from hfgpt.building import build_model
from hfgpt.demo_corpus import generate_stories
from hfgpt.recipe import load_recipe
from hfgpt.tasks.pretrain import load_pretraining_data
from hfgpt.training.trainer import HfGPTTrainer

STEPS, ROUNDS = 60, 7


class Clock(TrainerCallback):
    """Records when each step ends."""

    def __init__(self):
        self.ends = []

    def on_step_end(self, *args, **kwargs):
        self.ends.append(time.perf_counter())


def median_step(ends: list[float]) -> float:
    return statistics.median(after - before for before, after in itertools.pairwise(ends[5:]))


def trainer_step(recipe, data) -> float:
    clock = Clock()
    model = build_model(recipe.model, data.tokenizer)
    HfGPTTrainer(model=model, args=recipe.training, train_dataset=data.train, callbacks=[clock]).train()
    return median_step(clock.ends)


def bare_step(recipe, data) -> float:
    model = build_model(recipe.model, data.tokenizer).train()
    arguments = recipe.training
    optimizer = HfGPTTrainer(model=model, args=arguments).create_optimizer()
    schedule = get_linear_schedule_with_warmup(optimizer, int(arguments.warmup_steps), STEPS)
    sampler = RandomSampler(data.train)
    loader = DataLoader(
        data.train, arguments.per_device_train_batch_size, sampler=sampler, collate_fn=default_data_collator
    )
    ends = []
    for _, batch in zip(range(STEPS), loader, strict=False):
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), arguments.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        loss.item()
        ends.append(time.perf_counter())
    return median_step(ends)


def main():
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "text.txt").write_text("\n".join(generate_stories(1200)))
        overrides = ["--data.path", f"{folder}/text.txt", "--data.cache_dir", folder, "--training.output_dir", folder]
        overrides += ["--training.max_steps", str(STEPS), "--training.save_strategy", "no"]
        overrides += ["--training.eval_strategy", "no", "--training.logging_strategy", "no"]
        recipe = load_recipe("shakespeare-char", overrides)
        data = load_pretraining_data(recipe)
        pairs = [(trainer_step(recipe, data), bare_step(recipe, data)) for _ in range(ROUNDS)]
    trainer, bare = (statistics.median(times) * 1000 for times in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    print(f"Trainer {trainer:.1f} ms per step, bare loop {bare:.1f} ms; ratio {ratio:.3f}, median of {ROUNDS} pairs")


if __name__ == "__main__":
    main()
