"""Trainer reports what it computes: losses compared with a direct mean, checkpoints with the trained model."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from transformers import Trainer, TrainerCallback, default_data_collator

from hfgpt import modeling_hfgpt
from hfgpt.errors import InputError
from hfgpt.modeling_hfgpt import HfGPTForCausalLM
from hfgpt.training import arguments as module
from hfgpt.training.arguments import HfGPTTrainingArguments
from hfgpt.training.checkpoints import find_last_checkpoint
from hfgpt.training.flops import training_flops_per_token

# Float32 sums over a few hundred tokens, in another order.
ROUNDING = {"rel": 2e-6}


def token_losses(model: nn.Module, rows: list[dict[str, torch.Tensor]], smoothing: float = 0.0) -> torch.Tensor:
    """The loss of every target of the rows, concatenated: cross-entropy with the smoothed distribution."""
    losses = []
    with torch.no_grad():
        for row in rows:
            position_ids = row["position_ids"][None] if "position_ids" in row else None
            logits = model(row["input_ids"][None], position_ids=position_ids).logits[0].double()
            for position, target in enumerate(row["shift_labels"].tolist()):
                if target != -100:
                    wanted = torch.full((logits.shape[-1],), smoothing / logits.shape[-1], dtype=torch.float64)
                    wanted[target] += 1 - smoothing
                    losses.append(-(wanted * logits[position].log_softmax(-1)).sum())
    return torch.stack(losses)


def logged(trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def collate_plain_labels(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Batches as other collators make them: with labels that the model or Trainer has to shift."""
    return default_data_collator([{key: row[key] for key in row if key != "shift_labels"} for row in rows])


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_logged_loss_is_the_mean_over_tokens(smoothing, accumulation, make_model, make_blocks, make_trainer):
    model, blocks = make_model(), make_blocks(200, document_length=11, document_boundaries=True)
    rows = 3 * accumulation
    expected = [
        token_losses(model, [blocks[step * rows + row] for row in range(rows)], smoothing).mean().item()
        for step in range(2)
    ]
    trainer = make_trainer(
        model,
        blocks,
        learning_rate=0.0,
        max_steps=2,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=accumulation,
        label_smoothing_factor=smoothing,
    )
    trainer.train()
    assert logged(trainer, "loss") == pytest.approx(expected, **ROUNDING)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_plain_labels_are_shifted(smoothing, make_model, make_blocks, make_trainer):
    model, blocks = make_model(), make_blocks(100)
    rows = [dict(blocks[index]) for index in range(4)]
    for row in rows:
        row["shift_labels"] = torch.cat([row["labels"][1:], torch.tensor([-100])])
    trainer = make_trainer(
        model,
        blocks,
        data_collator=collate_plain_labels,
        learning_rate=0.0,
        max_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        label_smoothing_factor=smoothing,
    )
    trainer.train()
    assert logged(trainer, "loss") == pytest.approx([token_losses(model, rows, smoothing).mean().item()], **ROUNDING)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_accumulation_does_not_change_the_update(smoothing, make_model, make_blocks, make_trainer):
    # Documents of eleven tokens: rows have 14 or 15 targets each, so a mean of means would differ.
    blocks = make_blocks(300, document_length=11, document_boundaries=True)
    updated = []
    for batch_size in (8, 4, 1):
        trainer = make_trainer(
            make_model(),
            blocks,
            # An SGD step shows the size of the gradient, which AdamW and clipping would hide.
            optim="sgd",
            learning_rate=0.5,
            max_grad_norm=0.0,
            max_steps=2,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=8 // batch_size,
            label_smoothing_factor=smoothing,
        )
        trainer.train()
        updated.append(trainer.model.state_dict())
    start = make_model().state_dict()
    for name, tensor in updated[0].items():
        if "k_proj.bias" not in name:  # shifts all scores of a query equally: no gradient
            assert (tensor - start[name]).abs().max() > 1e-3
        for other in updated[1:]:
            # Gradients of order one, summed in another order and multiplied by 0.5 twice.
            torch.testing.assert_close(other[name], tensor, rtol=1e-5, atol=5e-6)


def test_evaluation_averages_over_tokens(make_model, make_blocks, make_trainer):
    # The last block is moved back and predicts 3 tokens, the others 16.
    model, blocks = make_model(embd_pdrop=0.5), make_blocks(4 * 16 + 1 + 3, keep_tail=True)
    losses = token_losses(model.eval(), list(blocks))
    assert len(losses) == 4 * 16 + 3
    trainer = make_trainer(model, eval_dataset=blocks, per_device_eval_batch_size=2)
    model.train()
    metrics = trainer.evaluate()
    assert model.training
    assert metrics["eval_loss"] == pytest.approx(losses.mean().item(), **ROUNDING)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(losses.mean().item()), rel=1e-5)
    assert metrics["eval_tokens"] == len(losses)
    assert metrics["eval_runtime"] > 0
    assert trainer.state.log_history[-1]["eval_loss"] == metrics["eval_loss"]
    # Trainer's own mean of means would be detected.
    of_means = Trainer.evaluate(trainer)["eval_loss"]
    assert abs(of_means - metrics["eval_loss"]) > 1e-3


def test_the_saved_model_is_the_trained_one(make_model, make_blocks, make_trainer, tmp_path):
    blocks = make_blocks(100, keep_tail=True)
    options = {"per_device_train_batch_size": 2, "max_steps": 3, "save_strategy": "steps", "save_steps": 3}
    trainer = make_trainer(make_model(resid_pdrop=0.2), blocks, eval_dataset=blocks, **options)
    trainer.train()
    evaluated = trainer.evaluate()
    trainer.save_model(tmp_path / "saved")
    for folder in (tmp_path / "saved", Path(trainer.args.output_dir) / "checkpoint-3"):
        fresh = HfGPTForCausalLM.from_pretrained(folder)
        again = make_trainer(fresh, eval_dataset=blocks).evaluate()
        # The same float32 weights and code: exactly the same number.
        assert again["eval_loss"] == evaluated["eval_loss"]
        # Trainer disables use_cache during training and would save it disabled.
        assert json.loads((folder / "config.json").read_text())["use_cache"] is True
    assert trainer.model.config.use_cache is False


def test_flops_are_tokens_times_flops_per_token(make_model, make_blocks, make_trainer):
    trainer = make_trainer(
        make_model(), make_blocks(200), max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2
    )
    trainer.train()
    assert trainer.state.total_flos == 3 * 2 * 2 * 16 * training_flops_per_token(trainer.model.config, 16)


class SetWeights(TrainerCallback):
    """Sets a weight before a step to a value as in a diverging run."""

    def __init__(self, step: int, value: float):
        self.step, self.value = step, value

    def on_step_begin(self, args, state, control, model, **kwargs):
        if state.global_step + 1 == self.step:
            model.model.norm.weight.data.fill_(self.value)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("saves", [True, False])
def test_non_finite_loss_ends_the_run(value, saves, make_model, make_blocks, make_trainer):
    trainer = make_trainer(
        make_model(),
        make_blocks(300),
        callbacks=[SetWeights(4, value)],
        max_steps=6,
        per_device_train_batch_size=2,
        logging_steps=100,
        save_strategy="steps" if saves else "no",
        save_steps=2,
    )
    with pytest.raises(InputError, match=r"^the loss is (nan|inf) at step 4\b.*training\.learning_rate") as error:
        trainer.train()
    last = Path(trainer.args.output_dir) / "checkpoint-2"
    assert last.is_dir() == saves
    assert (str(last) in str(error.value)) == saves
    assert "\n" not in str(error.value)


def test_non_finite_weights_are_not_saved_as_a_checkpoint(make_model, make_blocks, make_trainer):
    class OverflowGradient(TrainerCallback):
        """The loss of the step is finite, but not the weights after it, and nothing is logged before saving."""

        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            if state.global_step + 1 == 4:
                model.model.norm.weight.grad.fill_(math.inf)

    options = {"per_device_train_batch_size": 2, "logging_steps": 100, "save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer(make_model(), make_blocks(300), callbacks=[OverflowGradient()], max_steps=6, **options)
    last = Path(trainer.args.output_dir) / "checkpoint-2"
    with pytest.raises(InputError, match=re.escape(str(last))):
        trainer.train()
    assert find_last_checkpoint(trainer.args.output_dir) == last


def overflow_at(trainer, steps: set[int]):
    """Scales the loss as with float16 on an accelerator, and makes the gradients of some steps overflow."""

    def overflow(gradient):
        return gradient * math.inf if trainer.state.global_step + 1 in steps else gradient

    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    trainer.model.model.norm.weight.register_hook(overflow)


def test_a_step_skipped_by_the_gradient_scaler_is_allowed(make_model, make_blocks, make_trainer):
    trainer = make_trainer(make_model(), make_blocks(300), max_steps=4, per_device_train_batch_size=2)
    overflow_at(trainer, {2, 3})
    trainer.train()
    assert len(logged(trainer, "loss")) == 4
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert ["grad_norm" in entry for entry in entries] == [True, False, False, True]
    assert logged(trainer, "loss_scale") == [2.0, 1.0]
    json.dumps(trainer.state.log_history, allow_nan=False)


def test_skipping_steps_until_the_loss_scale_is_too_small_ends_the_run(make_model, make_blocks, make_trainer):
    trainer = make_trainer(make_model(), make_blocks(300), max_steps=6, per_device_train_batch_size=2)
    overflow_at(trainer, {2, 3, 4, 5})
    with pytest.raises(InputError, match=r"^the gradient norm is (inf|nan) at step 4\b"):
        trainer.train()


def test_a_non_finite_loss_ends_the_run_even_with_a_gradient_scaler(make_model, make_blocks, make_trainer):
    trainer = make_trainer(make_model(), make_blocks(300), callbacks=[SetWeights(2, math.nan)], max_steps=4)
    overflow_at(trainer, set())
    with pytest.raises(InputError, match=r"^the loss is nan at step 2\b"):
        trainer.train()


def test_a_much_too_high_learning_rate_ends_the_run(make_model, make_blocks, make_trainer):
    trainer = make_trainer(
        make_model(), make_blocks(300), learning_rate=1e30, max_steps=9, per_device_train_batch_size=2
    )
    with pytest.raises(InputError, match=r"^the (loss|grad_norm) is (nan|inf) .* step"):
        trainer.train()


@pytest.mark.parametrize("native", [True, False])
def test_bf16_follows_the_hardware(native, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "has_native_bf16", lambda device: native)
    asked = {"output_dir": str(tmp_path), "use_cpu": True}
    assert HfGPTTrainingArguments(**asked).bf16 is native
    assert HfGPTTrainingArguments(bf16=False, **asked).bf16 is False
    assert HfGPTTrainingArguments(bf16=True, **asked).bf16 is True
    assert HfGPTTrainingArguments(fp16=True, **asked).bf16 is False


def test_bf16_trains_on_a_cpu(make_model, make_blocks, make_trainer):
    model, seen = make_model(), set()
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *args: seen.add(args[-1].dtype))
    trainer = make_trainer(
        model, make_blocks(100), eval_dataset=make_blocks(40, keep_tail=True), bf16=True, max_steps=2
    )
    trainer.train()
    trainer.evaluate()
    assert seen == {torch.bfloat16}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("muon", [None, 0.02])
def test_decay_all_parameters(muon, make_model, make_trainer):
    model = make_model()
    options = {"weight_decay": 0.1, "muon_learning_rate": muon}
    decayed = {}
    for everything in (False, True):
        groups = make_trainer(model, decay_all_parameters=everything, **options).create_optimizer().param_groups
        decayed[everything] = {id(p) for group in groups if group["weight_decay"] == 0.1 for p in group["params"]}
    assert decayed[True] == {id(parameter) for parameter in model.parameters()}
    assert decayed[False] == {
        id(parameter) for name, parameter in model.named_parameters() if "bias" not in name and "norm" not in name
    }


@pytest.mark.parametrize("cause", ["weights", "optimizer", "Ctrl-C"])
def test_a_failed_checkpoint_leaves_no_partial_files(
    cause, make_model, make_blocks, make_trainer, monkeypatch, tmp_path
):
    if cause == "optimizer" and not Path("/dev/full").exists():
        pytest.skip("only Linux has a device that is always full")
    options = {"max_steps": 6, "per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer(make_model(), make_blocks(200), **options)
    output_dir = Path(trainer.args.output_dir)
    name = "transformers.modeling_utils.safe_save_file" if cause == "weights" else "torch.save"
    write = save_file if cause == "weights" else torch.save

    def write_until_full(content, path, *args, **kwargs):
        if "checkpoint-4" not in str(path):
            return write(content, path, *args, **kwargs)
        Path(path).write_bytes(b"half")
        if cause == "weights":
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        if cause == "Ctrl-C":
            raise KeyboardInterrupt
        # Through a link, so that removing the file does not affect the device.
        (tmp_path / "full").symlink_to("/dev/full")
        return write(content, tmp_path / "full", *args, **kwargs)

    monkeypatch.setattr(name, write_until_full)
    with pytest.raises(KeyboardInterrupt if cause == "Ctrl-C" else InputError) as stop:
        trainer.train()
    if cause != "Ctrl-C":
        following = "free some, then rerun the command with --resume, which resumes from checkpoint-2"
        assert str(stop.value) == f"no space left on the disk of '{output_dir / 'checkpoint-4'}': {following}"
    assert [path.name for path in output_dir.iterdir()] == ["checkpoint-2"]
    assert find_last_checkpoint(output_dir) == output_dir / "checkpoint-2"


def test_a_full_disk_at_the_first_checkpoint_leaves_nothing_to_resume_from(
    make_model, make_blocks, make_trainer, monkeypatch
):
    def fail(*args, **kwargs):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    trainer = make_trainer(make_model(), make_blocks(200), max_steps=2, save_strategy="steps", save_steps=1)
    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", fail)
    with pytest.raises(InputError, match=r"--resume, which starts over, since no checkpoint was saved$"):
        trainer.train()


@pytest.mark.parametrize(
    "options", [{}, {"gradient_accumulation_steps": 2}, {"gradient_checkpointing": True}], ids=str
)
def test_training_without_logits_takes_the_same_steps(options, make_model, make_blocks, make_trainer, monkeypatch):
    def train(**more) -> tuple[dict, list[float]]:
        # Adam would divide the gradient of a key's bias, which is zero but for rounding, by its own size.
        trainer = make_trainer(make_model(), make_blocks(4000), max_steps=5, optim="sgd", **options, **more)
        trainer.train()
        return trainer.model.state_dict(), [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    expected, losses = train()
    calls, compute = [], modeling_hfgpt.CrossEntropyInChunks.forward
    monkeypatch.setattr(modeling_hfgpt, "MANY_LOGITS", 0)
    monkeypatch.setattr(
        modeling_hfgpt.CrossEntropyInChunks, "forward", staticmethod(lambda *args: calls.append(1) or compute(*args))
    )
    found, found_losses = train()
    assert len(calls) == 5 * options.get("gradient_accumulation_steps", 1)
    assert found_losses == pytest.approx(losses, rel=1e-5)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    calls.clear()
    train(label_smoothing_factor=0.1)
    assert not calls, "label smoothing needs the logits"
