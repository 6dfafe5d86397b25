"""A time limit: steps and learning rates by a clock that the tests set, and the remaining time of a resumed run."""

from types import SimpleNamespace

import pytest
import torch
from datasets import IterableDataset

from hfgpt.errors import InputError
from hfgpt.training import time_limit
from hfgpt.training.arguments import HfGPTTrainingArguments

LINEAR = {"lr_scheduler_type": "linear", "learning_rate": 1.0, "warmup_steps": 0.25, "per_device_train_batch_size": 2}


@pytest.fixture
def clock(monkeypatch):
    """A clock that advances by the next of `steps` seconds, or by 0.5, at each reading after the first."""
    clock = SimpleNamespace(now=1000.0, steps=[])

    def read() -> float:
        now = clock.now
        clock.now += clock.steps.pop(0) if clock.steps else 0.5
        return now

    monkeypatch.setattr(time_limit.time, "monotonic", read)
    return clock


def rates(trainer) -> list[float]:
    return [round(entry["learning_rate"], 3) for entry in trainer.state.log_history if "learning_rate" in entry]


def test_training_ends_on_time_with_a_schedule_that_follows_the_clock(clock, make_model, make_blocks, make_trainer):
    trainer = make_trainer(make_model(), make_blocks(100), max_seconds=4, **LINEAR)
    trainer.train()
    assert trainer.state.global_step == trainer.state.max_steps == 8  # of 0.5 s each, more than an epoch of 3 steps
    # The rate of a step is that at its start: after 0, 0.5, 1 (the end of the warmup), 1.5 ... of 4 seconds.
    assert rates(trainer) == [0.0, 0.5, 1.0, 0.833, 0.667, 0.5, 0.333, 0.167]
    speed = trainer.state.log_history[-1]
    assert speed["train_samples_per_second"] == pytest.approx(2 * speed["train_steps_per_second"], rel=1e-3)


def test_slow_steps_end_a_training_earlier_with_the_same_schedule(clock, make_model, make_blocks, make_trainer):
    clock.steps = [0.5, 0.5, 2.0]
    trainer = make_trainer(make_model(), make_blocks(100), max_seconds=4, **LINEAR)
    trainer.train()
    assert trainer.state.global_step == 5
    assert rates(trainer) == [0.0, 0.5, 1.0, 0.333, 0.167]


def test_a_step_longer_than_the_limit_is_the_only_one(clock, make_model, make_blocks, make_trainer):
    clock.steps = [9.0]
    trainer = make_trainer(make_model(), make_blocks(100), max_seconds=4, **LINEAR)
    trainer.train()
    assert trainer.state.global_step == 1


def test_a_resumed_training_has_the_remaining_time(clock, make_model, make_blocks, make_trainer):
    saving = {"save_strategy": "steps", "save_steps": 3, "save_total_limit": None}
    whole = make_trainer(make_model(), make_blocks(100), max_seconds=4, **LINEAR, **saving)
    whole.train()
    clock.now += 1000  # time between two processes does not count
    resumed = make_trainer(make_model(), make_blocks(100), max_seconds=4, **LINEAR, **saving)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-3")
    assert rates(resumed) == rates(whole)
    for before, now in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert before.equal(now)
    finished = make_trainer(make_model(), make_blocks(100), max_seconds=4, **LINEAR, **saving)
    finished.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-8")  # takes no other step
    assert finished.state.global_step == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_steps": 5}, r"training.max_steps is 5, and cannot be combined with training.max_seconds: remove one"),
        (
            {"warmup_steps": 20},
            r"training.warmup_steps is 20 steps: with training.max_seconds, .* fraction of the time",
        ),
        (
            {"lr_scheduler_type": "inverse_sqrt"},
            r"training.lr_scheduler_type has inverse_sqrt, which counts steps: .*",
        ),
        (
            {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 20}},
            r"training.lr_scheduler_kwargs has num_decay_steps, which counts steps: .* such as linear or cosine",
        ),
        ({"logging_steps": 0.1}, r"training.logging_steps is 0.1, a fraction of all steps, .* set it to at least 1"),
        ({"max_seconds": 0}, r"training.max_seconds is 0; it must be above 0"),
    ],
)
def test_settings_that_need_a_number_of_steps_are_refused(arguments, message, tmp_path):
    with pytest.raises(InputError, match=f"^{message}"):
        HfGPTTrainingArguments(**{"output_dir": str(tmp_path), "max_seconds": 4.0, "use_cpu": True, **arguments})


def test_a_schedule_that_depends_on_the_loss_is_refused(make_model, make_blocks, make_trainer):
    arguments = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 2}
    trainer = make_trainer(make_model(), make_blocks(100), eval_dataset=make_blocks(40), max_seconds=4, **arguments)
    with pytest.raises(InputError, match=r"reduce_lr_on_plateau.* set training.lr_scheduler_type to another"):
        trainer.train()


def test_a_stream_is_refused(make_model, make_trainer):
    rows = IterableDataset.from_generator(lambda: iter([{"input_ids": [1, 2], "labels": [1, 2]}]))
    with pytest.raises(InputError, match=r"^training.max_seconds needs a dataset with a length: set training.max_st"):
        make_trainer(make_model(), rows, max_seconds=4)


def test_the_schedule_waits_when_a_step_was_skipped(clock):
    limit, state = time_limit.TimeLimit(4.0), SimpleNamespace(global_step=0, max_steps=1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(torch.optim.SGD([torch.zeros(1)]), lambda step: 1.0)
    limit.on_train_begin(None, state, None, lr_scheduler=scheduler)
    limit.on_optimizer_step(None, state, None, SimpleNamespace(step_was_skipped=True), scheduler)
    assert scheduler.last_epoch == 0
    limit.on_optimizer_step(None, state, None, SimpleNamespace(step_was_skipped=False), scheduler)
    assert scheduler.last_epoch == time_limit.PARTS / 4 - 1
