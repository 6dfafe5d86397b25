"""A run that diverges stops, or goes on from the weights and the optimizer state of its last checkpoint."""

import math
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from hfgpt.adapters import AdapterArguments, attach_adapter
from hfgpt.errors import InputError
from hfgpt.training.arguments import HfGPTTrainingArguments
from hfgpt.training.checkpoints import find_damage, list_checkpoints, step_of
from hfgpt.training.divergence import find_rollbacks

OPTIONS = {"per_device_train_batch_size": 2, "max_steps": 9, "save_strategy": "steps", "save_steps": 2}
ROLLING = {**OPTIONS, "on_divergence": "rollback"}


class Diverge(TrainerCallback):
    """Makes the weights non-finite before some steps, and keeps weights and learning rates after every step."""

    def __init__(self, *steps: int, value: float = math.nan):
        self.steps, self.value, self.weights, self.rates = steps, value, {}, {}

    def on_step_begin(self, args, state, control, model, optimizer, **kwargs):
        self.rates[state.global_step + 1] = [group["lr"] for group in optimizer.param_groups]
        self.weights[state.global_step] = {name: value.clone() for name, value in model.state_dict().items()}
        if state.global_step + 1 in self.steps:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data.fill_(self.value)


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("muon", [None, 0.02])
def test_a_rollback_restores_weights_and_optimizer_and_keeps_step_and_rate(
    value, muon, make_model, make_blocks, make_trainer, tmp_path
):
    options = {**ROLLING, "lr_scheduler_type": "linear", "muon_learning_rate": muon}
    whole, diverging = Diverge(), Diverge(6, value=value)
    make_trainer(
        make_model(), make_blocks(300), callbacks=[whole], output_dir=str(tmp_path / "whole"), **options
    ).train()
    trainer = make_trainer(make_model(), make_blocks(300), callbacks=[diverging], **options)
    seen = []
    trainer.add_callback(type("Rows", (TrainerCallback,), {})())
    step = trainer.training_step
    trainer.training_step = lambda model, inputs, *rest: (
        seen.append(inputs["input_ids"]),
        step(model, inputs, *rest),
    )[1]
    trainer.train()
    assert find_rollbacks(trainer.state.log_history) == [{"from_step": 6, "to_step": 4}]
    assert same(diverging.weights[5], whole.weights[5])
    assert same(diverging.weights[6], whole.weights[4]), "after step 6, the weights of step 4"
    assert not same(diverging.weights[7], whole.weights[7])
    assert diverging.rates == whole.rates, "the schedule goes on"
    assert len(seen) == 9, "no step is repeated"
    assert torch.equal(seen[6][0], make_blocks(300)[12]["input_ids"]), "step 7 takes its own rows"
    losses = [entry["step"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses == [1, 2, 3, 4, 5, 7, 8, 9]
    assert all(math.isfinite(value) for entry in trainer.state.log_history for value in entry.values())


def test_the_optimizer_of_the_checkpoint_is_restored(make_model, make_blocks, make_trainer):
    diverging = Diverge(6)
    trainer = make_trainer(make_model(), make_blocks(300), callbacks=[diverging], **ROLLING)
    moments = {}

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, optimizer, **kwargs):
            moments[state.global_step] = [value["exp_avg"].clone() for value in optimizer.state.values()]

        def on_step_begin(self, args, state, control, optimizer, **kwargs):
            if state.global_step == 6:
                moments["restored"] = [value["exp_avg"].clone() for value in optimizer.state.values()]

    trainer.add_callback(Keep())
    trainer.train()
    assert all(map(torch.equal, moments["restored"], moments[4]))
    assert not all(map(torch.equal, moments[7], moments[4]))
    assert all(value.isfinite().all() for value in moments[9])


@pytest.mark.parametrize("resumed_from", [2, 4, 6, 8])
def test_a_resumed_run_rolls_back_in_the_same_way(resumed_from, make_model, make_blocks, make_trainer, tmp_path):
    """Killed before the rollback, in the step of the rollback, and after it."""
    options = {**ROLLING, "save_total_limit": None}
    whole = make_trainer(make_model(), make_blocks(300), callbacks=[Diverge(6)], **options)
    whole.train()
    assert find_rollbacks(whole.state.log_history) == [{"from_step": 6, "to_step": 4}]
    resumed = make_trainer(make_model(), make_blocks(300), callbacks=[Diverge(6)], **options)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-{resumed_from}")
    assert find_rollbacks(resumed.state.log_history) == [{"from_step": 6, "to_step": 4}]
    assert same(resumed.model.state_dict(), whole.model.state_dict())


@pytest.mark.parametrize("limit", [1, 2])
@pytest.mark.parametrize("stopped_at", [5, 7])
def test_a_stopped_run_rolls_back_to_the_same_checkpoint(
    limit, stopped_at, make_model, make_blocks, make_trainer, tmp_path
):
    """And not to the checkpoint that was saved because the run was stopped."""

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == stopped_at:
                control.should_save = control.should_training_stop = True

    options = {**ROLLING, "save_total_limit": limit}
    whole = make_trainer(
        make_model(), make_blocks(300), callbacks=[Diverge(6)], output_dir=str(tmp_path / "whole"), **options
    )
    whole.train()
    stopped = make_trainer(make_model(), make_blocks(300), callbacks=[Diverge(6), Stop()], **options)
    stopped.train()
    kept = [step_of(checkpoint) for checkpoint in list_checkpoints(stopped.args.output_dir)]
    assert kept == [stopped_at - 1, stopped_at]
    resumed = make_trainer(make_model(), make_blocks(300), callbacks=[Diverge(6)], **options)
    resumed.train(resume_from_checkpoint=f"{stopped.args.output_dir}/checkpoint-{stopped_at}")
    assert find_rollbacks(resumed.state.log_history) == [{"from_step": 6, "to_step": 4}]
    assert same(resumed.model.state_dict(), whole.model.state_dict())


@pytest.mark.parametrize("step", [5, 6])
def test_checkpoints_at_the_end_of_an_epoch_are_rolled_back_to(step, make_model, make_blocks, make_trainer):
    """An epoch has three steps; the weights of a step that diverges at its end are not saved."""
    options = {**ROLLING, "save_strategy": "epoch", "save_total_limit": None}
    trainer = make_trainer(make_model(), make_blocks(100), callbacks=[Diverge(step)], **options)
    trainer.train()
    assert find_rollbacks(trainer.state.log_history) == [{"from_step": step, "to_step": 3}]
    checkpoints = list_checkpoints(trainer.args.output_dir)
    assert [step_of(checkpoint) for checkpoint in checkpoints] == [3, 6, 9]
    assert list(map(find_damage, checkpoints)) == [None] * 3
    assert all(value.isfinite().all() for value in load_file(checkpoints[1] / "model.safetensors").values())


def test_an_adapter_is_rolled_back(make_model, make_blocks, make_trainer, tmp_path):
    def adapted():
        return attach_adapter(make_model(), AdapterArguments(r=2), "CAUSAL_LM")

    whole, diverging = Diverge(), Diverge(6)
    make_trainer(adapted(), make_blocks(300), callbacks=[whole], output_dir=str(tmp_path / "whole"), **ROLLING).train()
    trainer = make_trainer(adapted(), make_blocks(300), callbacks=[diverging], **ROLLING)
    trainer.train()
    assert find_rollbacks(trainer.state.log_history) == [{"from_step": 6, "to_step": 4}]
    assert same(diverging.weights[6], whole.weights[4])
    assert not same(trainer.model.state_dict(), whole.weights[4]), "the restored weights are trained"


def test_on_an_accelerator_divergence_is_noticed_at_the_next_logging_step(
    make_model, make_blocks, make_trainer, tmp_path
):
    options = {**ROLLING, "logging_steps": 3, "max_steps": 12}
    trainer = make_trainer(make_model(), make_blocks(500), callbacks=[Diverge(7)], **options)
    trainer.checks_each_step = False
    trainer.train()
    # The checkpoint of step 8 was due before the next logging step, and is not saved with the weights that diverged.
    assert find_rollbacks(trainer.state.log_history) == [{"from_step": 8, "to_step": 6}]
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [3, 6, 9, 12]
    options |= {"on_divergence": "stop", "save_steps": 6, "output_dir": str(tmp_path / "stopped")}
    stopped = make_trainer(make_model(), make_blocks(500), callbacks=[Diverge(8)], **options)
    stopped.checks_each_step = False
    with pytest.raises(InputError, match=r"^the loss is nan between steps 7 and 9: .*checkpoint-6, or pass --resume "):
        stopped.train()


def test_an_infinite_gradient_norm_is_divergence(make_model, make_blocks, make_trainer):
    trainer = make_trainer(make_model(), make_blocks(300), **OPTIONS)

    def overflow(gradient):
        return gradient * math.inf if trainer.state.global_step + 1 == 3 else gradient

    trainer.model.model.norm.weight.register_hook(overflow)
    with pytest.raises(InputError, match=r"^the gradient norm is (inf|nan) at step 3: start a new run .*checkpoint-2"):
        trainer.train()


def test_too_many_rollbacks_end_the_run(make_model, make_blocks, make_trainer):
    callback = Diverge(3, 5, 6, 7)
    trainer = make_trainer(make_model(), make_blocks(300), callbacks=[callback], **ROLLING, max_rollbacks=2)
    last = Path(trainer.args.output_dir) / "checkpoint-4"
    with pytest.raises(InputError) as error:
        trainer.train()
    assert str(error.value) == (
        "the loss is nan at step 6, after 2 rollbacks (training.max_rollbacks): start a new run with a lower "
        f"training.learning_rate or training.max_grad_norm, from the last checkpoint with --model.path {last}"
    )


def test_without_a_checkpoint_there_is_no_rollback(make_model, make_blocks, make_trainer, tmp_path):
    (tmp_path / "run" / "checkpoint-1").mkdir(parents=True)  # of another run
    trainer = make_trainer(make_model(), make_blocks(300), callbacks=[Diverge(2)], **ROLLING)
    with pytest.raises(
        InputError,
        match=r"^the loss is nan at step 2, before the first checkpoint of training.save_strategy: start a new run",
    ):
        trainer.train()


def test_a_damaged_checkpoint_is_not_restored(make_model, make_blocks, make_trainer):
    class Damage(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / "optimizer.pt").write_bytes(b"")

    trainer = make_trainer(make_model(), make_blocks(300), callbacks=[Damage(), Diverge(3)], **ROLLING)
    with pytest.raises(InputError, match=r"checkpoint-2' is damaged: optimizer.pt does not match its checksum; rerun"):
        trainer.train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_divergence": "x"}, "training.on_divergence is 'x'; it must be stop or rollback"),
        (
            {"on_divergence": "rollback", "save_strategy": "no"},
            "is rollback, which needs checkpoints with the optimizer",
        ),
        ({"on_divergence": "rollback", "save_only_model": True}, "is rollback, which needs checkpoints with the"),
        (
            {"on_divergence": "rollback", "auto_find_batch_size": True},
            "does not support training.auto_find_batch_size",
        ),
        ({"max_rollbacks": 0}, "training.max_rollbacks is 0; it must be at least 1"),
    ],
)
def test_settings_that_cannot_work_are_refused(options, message, tmp_path):
    with pytest.raises(InputError, match=re.escape(message)):
        HfGPTTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **options)
