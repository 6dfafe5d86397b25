"""Fine-tuning with Trainer: loss and gradient do not depend on how rows are divided into batches or packed."""

import datasets
import numpy as np
import pytest
import torch

from hfgpt.data.collators import IGNORED, PaddingCollator
from hfgpt.data.instructions import pack_rows
from hfgpt.errors import InputError
from hfgpt.evaluation.classification import classification_loss, measure_classifier
from hfgpt.modeling_hfgpt import HfGPTForCausalLM, HfGPTForSequenceClassification
from hfgpt.training.arguments import FineTuningArguments, HfGPTTrainingArguments
from hfgpt.training.trainer import HfGPTTrainer


def answer_rows(number=8, longest=20):
    """Rows of random tokens, of which the last third are targets."""
    random = np.random.default_rng(0)
    rows = []
    for length in random.integers(4, longest, number):
        ids = random.integers(2, 64, length + 1).tolist()
        targets = [IGNORED] * (length - length // 3 + 1) + ids[length - length // 3 + 1 :]
        rows.append(
            {"input_ids": ids[:-1], "labels": targets[:-1], "shift_labels": targets[1:], "length": int(length)}
        )
    return datasets.Dataset.from_list(rows)


def label_rows(number=8):
    random = np.random.default_rng(0)
    return datasets.Dataset.from_list(
        [
            {"input_ids": random.integers(2, 64, length).tolist(), "labels": int(length % 3), "length": int(length)}
            for length in random.integers(1, 20, number)
        ]
    )


def train_one_step(tmp_path, model, rows, batch, accumulation, **options):
    """Loss, gradient norm and weights after one step over all rows."""
    arguments = HfGPTTrainingArguments(
        output_dir=str(tmp_path / "run"),
        use_cpu=True,
        bf16=False,
        max_steps=1,
        logging_steps=1,
        learning_rate=0.1,
        optim="sgd",
        lr_scheduler_type="constant",
        save_strategy="no",
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=1e9,
        train_sampling_strategy="sequential",
    )
    trainer = HfGPTTrainer(model, arguments, train_dataset=rows, data_collator=PaddingCollator(1), **options)
    trainer.train()
    log = trainer.state.log_history[0]
    return log["loss"], log["grad_norm"], torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


CUTS = [(8, 1), (4, 2), (2, 4), (1, 8), (3, 3)]


def test_the_loss_of_answers_does_not_depend_on_micro_batches(tiny_config, tmp_path):
    """1e-5: float32 sums in another order."""
    rows, results = answer_rows(), []
    for batch, accumulation in CUTS:
        torch.manual_seed(0)
        results.append(train_one_step(tmp_path, HfGPTForCausalLM(tiny_config()), rows, batch, accumulation))
    for loss, norm, weights in results[1:]:
        assert loss == pytest.approx(results[0][0], abs=1e-5)
        assert norm == pytest.approx(results[0][1], abs=1e-5)
        assert torch.allclose(weights, results[0][2], atol=1e-6)
    assert results[0][1] > 0.1


@pytest.mark.parametrize("weights", [None, [0.5, 2.0, 1.0]])
def test_the_loss_of_a_classifier_does_not_depend_on_micro_batches(tiny_config, tmp_path, weights):
    rows, results = label_rows(), []
    for batch, accumulation in CUTS:
        torch.manual_seed(0)
        model = HfGPTForSequenceClassification(tiny_config(num_labels=3))
        options = {"compute_loss_func": classification_loss(weights)}
        results.append(train_one_step(tmp_path, model, rows, batch, accumulation, **options))
    for loss, norm, trained in results[1:]:
        assert loss == pytest.approx(results[0][0], abs=1e-5)
        assert norm == pytest.approx(results[0][1], abs=1e-5)
        assert torch.allclose(trained, results[0][2], atol=1e-6)


def test_packed_rows_give_the_same_loss_and_gradient_as_unpacked_ones(tiny_config):
    """1e-6: float32 sums in another order."""
    rows = answer_rows(12, longest=15)
    packed = pack_rows(rows, 32)
    assert len(packed) < len(rows) / 2
    losses, gradients = [], []
    for data in (rows, packed):
        torch.manual_seed(0)
        model = HfGPTForCausalLM(tiny_config())
        batch = PaddingCollator(1)([data[index] for index in range(len(data))])
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert torch.allclose(*gradients, atol=1e-6)
    assert gradients[0].abs().max() > 0.01
    # Without restarting positions, a row would attend to the previous one.
    batch["position_ids"] = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])
    assert abs(model(**batch, use_cache=False).loss.item() - losses[0]) > 1e-3


def test_evaluation_during_training_averages_over_rows(tiny_config, tmp_path):
    torch.manual_seed(0)
    model = HfGPTForSequenceClassification(tiny_config(num_labels=3))
    arguments = HfGPTTrainingArguments(
        output_dir=str(tmp_path / "run"), use_cpu=True, bf16=False, per_device_eval_batch_size=3
    )
    rows = label_rows(10)
    trainer = HfGPTTrainer(
        model,
        arguments,
        eval_dataset=rows,
        data_collator=PaddingCollator(1),
        measure=lambda model, batches, **options: measure_classifier(model, batches, ["a", "b", "c"], **options),
    )
    measured = trainer.evaluate()
    direct = measure_classifier(model, [PaddingCollator(1)([rows[i] for i in range(10)])], ["a", "b", "c"]).to_dict()
    assert measured["eval_accuracy"] == direct["eval_accuracy"]
    assert measured["eval_loss"] == pytest.approx(direct["eval_loss"], abs=1e-6)


def test_arguments(tmp_path):
    assert FineTuningArguments(output_dir=str(tmp_path)).train_sampling_strategy == "group_by_length"
    with pytest.raises(
        InputError, match=r"training.trainable is 'none'; it must be all, last_blocks, head or adapters"
    ):
        FineTuningArguments(output_dir=str(tmp_path), trainable="none")
    with pytest.raises(InputError, match=r"training.last_blocks is 0; it must be at least 1"):
        FineTuningArguments(output_dir=str(tmp_path), last_blocks=0)
