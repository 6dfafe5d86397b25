"""The rows of a step: the same for any number of processes, and each row once per epoch."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from hfgpt.data.blocks import IGNORED
from hfgpt.errors import InputError
from hfgpt.training.batches import RowOrder, StepBatches, StepRows, count_rounds, draw_seed
from hfgpt.training.gradients import PairwiseSums
from hfgpt.training.trainer import HfGPTTrainingArguments


@settings(deadline=None)
@given(
    rows=st.integers(1, 60),
    batch_size=st.integers(1, 5),
    batches=st.integers(1, 7),
    missing=st.integers(0, 4),
    processes=st.sampled_from([1, 2, 3, 4, 8]),
    drop_last=st.booleans(),
)
def test_each_step_has_the_same_batches_on_any_number_of_processes(
    rows, batch_size, batches, missing, processes, drop_last
):
    rows_per_step = max(batch_size * batches - missing, 1)
    order = RowOrder(rows, seed=3)
    shards = [
        StepBatches(order, batch_size, rows_per_step, processes, index, drop_last, epoch=2)
        for index in range(processes)
    ]
    kept = rows // batch_size * batch_size if drop_last else rows
    expected = order.of_epoch(2)[:kept].tolist()
    taken = [list(shard) for shard in shards]
    assert {len(shard) for shard in shards} == {len(shard) for shard in taken} == {len(taken[0])}, "all in step"
    start = done = 0
    while start < kept:
        step = expected[start : start + rows_per_step]
        rounds = count_rounds(len(step), batch_size, processes)
        of_step = [batch.tolist() for shard in taken for batch in shard[done : done + rounds]]
        full = [step[first : first + batch_size] for first in range(0, len(step), batch_size)]
        assert of_step[: len(full)] == full
        assert of_step[len(full) :] == [[~step[0]]] * (len(of_step) - len(full)), "rows that teach nothing"
        start, done = start + rows_per_step, done + rounds
    assert done == len(taken[0])


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


def test_a_row_without_labels_keeps_everything_else():
    rows = Dataset.from_dict({"input_ids": [[1, 2], [3]], "labels": [[1, 2], [3]], "length": [2, 1]})
    assert StepRows(rows).__getitems__(np.array([1, 0])) == [rows[1], rows[0]]
    (row,) = StepRows(rows).__getitems__(~np.array([0]))
    assert row == {"input_ids": [1, 2], "labels": [IGNORED] * 2, "length": 2}
    (row,) = StepRows([{"labels": 1}]).__getitems__(~np.array([0]))
    assert row == {"labels": IGNORED}
    (row,) = StepRows([{"shift_labels": torch.tensor([5, 6])}]).__getitems__(~np.array([0]))
    assert row["shift_labels"].tolist() == [IGNORED, IGNORED]


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


def arguments(**fields) -> HfGPTTrainingArguments:
    return HfGPTTrainingArguments(output_dir="none", use_cpu=True, bf16=False, **fields)


def test_a_global_batch_is_divided_into_batches():
    divided = arguments(global_batch_size=20, per_device_train_batch_size=8)
    assert (divided.rows_per_step, divided.per_device_train_batch_size) == (20, 8)
    assert (divided.gradient_accumulation_steps, divided.batches_per_step) == (3, 3)
    small = arguments(global_batch_size=4, per_device_train_batch_size=8)
    assert (small.per_device_train_batch_size, small.gradient_accumulation_steps) == (4, 1)
    pair = arguments(gradient_accumulation_steps=3, per_device_train_batch_size=8)
    assert (pair.rows_per_step, pair.gradient_accumulation_steps) == (24, 3)


def test_fsdp_on_a_cpu_is_refused(monkeypatch):
    with pytest.raises(InputError, match=r"training\.fsdp has no effect on a CPU"):
        arguments(fsdp="full_shard")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match=r"training\.fsdp has no effect on a CPU"):
        arguments()


def test_a_global_batch_and_accumulation_are_refused_together():
    with pytest.raises(InputError, match="gradient_accumulation_steps is 2, and cannot be combined with"):
        arguments(global_batch_size=8, gradient_accumulation_steps=2)
    with pytest.raises(InputError, match="global_batch_size is 0; it must be at least 1"):
        arguments(global_batch_size=0)
