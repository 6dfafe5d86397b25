"""The rows of a step: the same for any number of processes, and each row once per epoch."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import ParallelismConfig
from hypothesis import given, settings
from hypothesis import strategies as st

from hfgpt.data.blocks import IGNORED
from hfgpt.errors import InputError
from hfgpt.training.arguments import HfGPTTrainingArguments
from hfgpt.training.batches import RowOrder, StepBatches, count_rounds, draw_seed, ignore_labels
from hfgpt.training.gradients import PairwiseSums
from hfgpt.training.trainer import HfGPTTrainer


def of_processes(processes: int, index: int = 0, **fields) -> SimpleNamespace:
    """The arguments of one of several processes."""
    defaults = {"global_batch_size": None, "device": torch.device("cpu"), "dataloader_drop_last": False}
    return SimpleNamespace(**{**defaults, **fields}, data_processes=processes, data_index=index)


TENSOR_PARALLEL = {"parallelism_config": ParallelismConfig(tp_size=2)}


@settings(deadline=None)
@given(
    rows=st.integers(1, 60),
    batch_size=st.integers(1, 5),
    batches=st.integers(1, 7),
    missing=st.integers(0, 4),
    processes=st.sampled_from([1, 2, 3, 4, 8]),
    drop_last=st.booleans(),
    has_global_batch=st.booleans(),
)
def test_each_step_has_the_same_batches_on_any_number_of_processes(
    rows, batch_size, batches, missing, processes, drop_last, has_global_batch
):
    rows_per_step = max(batch_size * batches - missing, 1)
    order = RowOrder(rows, seed=3)
    fields = {
        "per_device_train_batch_size": batch_size,
        "rows_per_step": rows_per_step,
        "dataloader_drop_last": drop_last,
        "global_batch_size": rows_per_step if has_global_batch else None,
    }
    shards = [StepBatches(order, of_processes(processes, index, **fields)) for index in range(processes)]
    for shard in shards:
        shard.set_epoch(2)
    kept = rows // batch_size * batch_size if drop_last else rows
    expected = order.of_epoch(2)[:kept].tolist()
    taken = [list(shard) for shard in shards]
    assert {len(shard) for shard in shards} == {len(shard) for shard in taken} == {len(taken[0])}, "all in step"
    done = 0
    for number, start in enumerate(range(0, kept, rows_per_step)):
        step = expected[start : start + rows_per_step]
        rounds = count_rounds(shards[0].arguments, len(step))
        of_step = [batch for shard in taken for batch in shard[done : done + rounds]]
        full = [step[first : first + batch_size] for first in range(0, len(step), batch_size)]
        assert of_step[: len(full)] == full
        assert of_step[len(full) :] == [step[:1]] * (len(of_step) - len(full)), "these do not count"
        assert shards[0].count_batches(number) == shards[0].count_batches(number + shards[0].steps) == len(full)
        done += rounds
    assert done == len(taken[0])


@pytest.mark.parametrize(
    ("processes", "rows", "global_batch_size", "rounds"),
    [(1, 20, 20, 5), (2, 20, 20, 4), (2, 20, None, 3), (3, 20, 20, 2), (4, 20, 20, 2), (4, 4, 20, 1), (2, 0, 20, 0)],
)
def test_processes_take_a_power_of_two_of_batches(processes, rows, global_batch_size, rounds):
    fields = {"per_device_train_batch_size": 4, "global_batch_size": global_batch_size}
    found = count_rounds(of_processes(processes, **fields), rows)
    assert found == (1 << (rounds - 1).bit_length() if processes == 3 and rounds else rounds)
    accelerator = of_processes(processes, **fields, device=torch.device("cuda"))
    assert count_rounds(accelerator, rows) == -(-rows // (4 * processes)), "sums are not pairwise there"


def test_the_order_is_a_function_of_seed_and_epoch():
    lengths = [index % 7 for index in range(50)]
    for strategy in ("random", "group_by_length"):
        order = RowOrder(50, 1, strategy, lengths, rows_per_step=4)
        first = order.of_epoch(0)
        torch.rand(1)  # the global random state has no effect
        assert (first == order.of_epoch(0)).all()
        assert sorted(first) == list(range(50))
        assert (first != order.of_epoch(1)).any()
        assert (first != RowOrder(50, 2, strategy, lengths, rows_per_step=4).of_epoch(0)).any()
    assert (RowOrder(5, 1, "sequential").of_epoch(3) == np.arange(5)).all()


def test_labels_of_a_batch_are_ignored():
    batch = {"input_ids": torch.ones(2, 3), "labels": torch.tensor([1, 2]), "shift_labels": torch.ones(2, 3)}
    ignored = ignore_labels(batch)
    assert ignored["labels"].tolist() == [IGNORED, IGNORED]
    assert (ignored["shift_labels"] == IGNORED).all()
    assert ignored["input_ids"] is batch["input_ids"]
    assert batch["labels"].tolist() == [1, 2]


def test_each_batch_has_its_own_seed():
    seeds = [draw_seed(seed, step, batch) for seed in range(3) for step in range(20) for batch in range(20)]
    assert len({*seeds}) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert draw_seed(42, 1, 0) == draw_seed(42, 1, 0)


@pytest.mark.parametrize("batches", [1, 2, 3, 4, 7, 8, 13])
def test_gradients_are_summed_as_a_binary_tree(batches):
    layer = torch.nn.Linear(3, 2)
    generator = torch.Generator().manual_seed(batches)
    gradients = torch.randn(batches, 2, 3, generator=generator) * 10.0 ** torch.randn(batches, 1, 1)

    def tree(values: list[torch.Tensor]) -> torch.Tensor:
        """Complete subtrees of a power of two first, from the left."""
        if len(values) == 1:
            return values[0]
        half = 1 << (len(values) - 1).bit_length() - 1
        return tree(values[:half]) + tree(values[half:])

    sums = PairwiseSums(layer)
    for index, gradient in enumerate(gradients):
        layer.weight.grad = gradient.clone()
        sums.add(is_last=index == batches - 1)
    assert torch.equal(layer.weight.grad, tree([*gradients]))
    assert layer.bias.grad is None


def test_gradients_of_parameters_that_only_some_batches_use_are_kept():
    first, second = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    sums = PairwiseSums(torch.nn.ParameterList([first, second]))
    for index, parameter in enumerate((first, second, second, first, second)):
        parameter.grad = torch.full((1,), 10.0**index)
        sums.add(is_last=index == 4)
    assert (first.grad.item(), second.grad.item()) == (1001, 10110)


def arguments(**fields) -> HfGPTTrainingArguments:
    return HfGPTTrainingArguments(output_dir="none", use_cpu=True, bf16=False, **fields)


def test_a_global_batch_is_divided_into_batches():
    divided = arguments(global_batch_size=20, per_device_train_batch_size=8)
    assert (divided.rows_per_step, divided.batches_per_step) == (20, 3)
    trainer = HfGPTTrainer(torch.nn.Linear(1, 1), divided, train_dataset=[{"labels": 0}] * 50)
    assert trainer.args.gradient_accumulation_steps == 3
    assert divided.gradient_accumulation_steps == 1, "the arguments can be used again"
    pair = arguments(gradient_accumulation_steps=3, per_device_train_batch_size=8)
    assert (pair.rows_per_step, pair.batches_per_step) == (24, 3)


def test_a_global_batch_that_cannot_be_kept_is_refused(monkeypatch):
    with pytest.raises(InputError, match="cannot be combined with auto_find_batch_size"):
        arguments(global_batch_size=8, auto_find_batch_size=True)
    with pytest.raises(InputError, match="needs a dataset with a length"):
        HfGPTTrainer(torch.nn.Linear(1, 1), arguments(global_batch_size=8), train_dataset=Stream())
    monkeypatch.setattr(HfGPTTrainingArguments, "world_size", 4)
    with pytest.raises(InputError, match=r"is 8, which is only 1 batch of 8 rows for 4 .* at most 2$"):
        arguments(global_batch_size=8)
    with pytest.raises(InputError, match=r"is 2, which is only 1 batch of 8 rows for 4 .* raise it to at least 4$"):
        arguments(global_batch_size=2)
    with pytest.raises(InputError, match="average_tokens_across_devices is false"):
        arguments(average_tokens_across_devices=False)


class Stream(torch.utils.data.IterableDataset):
    """Two rows, whose number is known."""

    def __len__(self):
        return 2

    def __iter__(self):
        yield from ({"input_ids": torch.ones(3, dtype=torch.long), "labels": torch.ones(3, dtype=torch.long)},) * 2


def test_a_stream_with_a_length_is_read_in_its_own_order(make_model, tmp_path):
    options = arguments(max_steps=2, per_device_train_batch_size=2, save_strategy="no", disable_tqdm=True)
    options.output_dir = str(tmp_path)
    assert HfGPTTrainer(make_model(), options, train_dataset=Stream()).train().global_step == 2


def test_one_process_has_the_whole_model(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    alone = arguments(fsdp=True)
    assert (alone.fsdp, alone.is_sharded) == (False, False)


@pytest.mark.parametrize(
    ("fields", "environment", "message"),
    [
        (
            {"fsdp": True, "fsdp_config": {"version": 1}},
            {},
            r"FSDP1 is not supported: set .*fsdp_config\.version to 2$",
        ),
        ({"fsdp": True, "auto_find_batch_size": True}, {}, "auto_find_batch_size cannot be combined with FSDP"),
        ({}, {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "FSDP1 is not supported: set fsdp_version to 2 in"),
        (
            {"fsdp": True, "fsdp_config": {"activation_checkpointing": True}},
            {},
            r"draws other dropout in the backward pass: .* set training\.gradient_checkpointing instead$",
        ),
        (
            {"parallelism_config": ParallelismConfig(tp_size=4)},
            {},
            "has a tp_size of 4 in a total size of 4, for 2 processes: set tp_size to 2 and every other size to 1; ",
        ),
        (
            {},
            {
                "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
                "PARALLELISM_CONFIG_TP_SIZE": "2",
                "PARALLELISM_CONFIG_CP_SIZE": "2",
            },
            "a tp_size of 2 in a total size of 4, for 2 processes",
        ),
        ({"fsdp": True} | TENSOR_PARALLEL, {}, r"^training\.fsdp cannot be combined with tensor parallelism: unset"),
        ({"torch_compile": True} | TENSOR_PARALLEL, {}, r"^training\.torch_compile cannot be combined with tensor "),
        (TENSOR_PARALLEL, {"ACCELERATE_USE_FSDP": "true"}, "asks for both FSDP and tensor parallelism: remove one"),
    ],
)
def test_parallelism_that_would_train_another_model_is_refused(fields, environment, message, monkeypatch):
    monkeypatch.setattr(HfGPTTrainingArguments, "world_size", 2)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=message):
        arguments(**fields)


def test_fsdp_on_the_cpu_of_a_machine_with_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(HfGPTTrainingArguments, "world_size", 2)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    with pytest.raises(
        InputError, match=r"needs a machine without a GPU: set CUDA_VISIBLE_DEVICES to an empty string$"
    ):
        arguments(fsdp=True)


def test_gradients_are_summed_in_float32_with_fsdp(monkeypatch):
    monkeypatch.setattr(HfGPTTrainingArguments, "world_size", 2)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    found = HfGPTTrainingArguments(output_dir="none", use_cpu=True, bf16=True, fsdp=True)
    policy = found.fsdp_plugin_args["mixed_precision_policy"]
    assert (policy.param_dtype, policy.reduce_dtype, policy.output_dtype) == (torch.bfloat16, torch.float32, None)


def test_a_global_batch_and_accumulation_are_refused_together():
    with pytest.raises(InputError, match="gradient_accumulation_steps is 2, and cannot be combined with"):
        arguments(global_batch_size=8, gradient_accumulation_steps=2)
    with pytest.raises(InputError, match="global_batch_size is 0; it must be at least 1"):
        arguments(global_batch_size=0)
