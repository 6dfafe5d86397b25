"""Perplexity compared with the definition: one token at a time, each with its stated context."""

import math

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, LargeList, Value
from torch import nn
from torch.utils.data import DataLoader
from transformers import default_data_collator
from transformers.modeling_outputs import CausalLMOutputWithPast

from hfgpt.data.blocks import BlockDataset
from hfgpt.data.streams import TokenStream
from hfgpt.evaluation.perplexity import Perplexity, measure_perplexity, row_nll
from hfgpt.modeling_hfgpt import HfGPTForCausalLM

VOCAB_SIZE = 64
# Float32 logits of a batch and of a single row differ in their last bits; sums are float64.
ROUNDING = {"rel": 2e-6}


@pytest.fixture(scope="module")
def model(tiny_config) -> HfGPTForCausalLM:
    torch.manual_seed(0)
    return HfGPTForCausalLM(tiny_config(vocab_size=VOCAB_SIZE)).eval()


def make_stream(tokens: int, *lengths: int) -> TokenStream:
    values = np.random.default_rng(1).integers(0, VOCAB_SIZE, tokens)
    documents = np.split(values, np.cumsum(lengths or (tokens,))[:-1])
    features = Features({"input_ids": LargeList(Value("uint16"))})
    return TokenStream(Dataset.from_dict({"input_ids": documents}, features=features))


def nll_of(model: nn.Module, context: np.ndarray, token: int) -> float:
    """Negative log-likelihood of one token after a context, in nats."""
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(context.astype(np.int64))[None]).logits
    return -logits[0, -1].double().log_softmax(-1)[int(token)].item()


def measure_blocks(model: nn.Module, blocks: BlockDataset, batch_size: int = 3) -> Perplexity:
    return measure_perplexity(model, DataLoader(blocks, batch_size=batch_size, collate_fn=default_data_collator))


@pytest.mark.parametrize("tokens", [8, 9, 17, 30, 50])
@pytest.mark.parametrize("stride", [None, 1, 3, 5])
def test_each_token_is_predicted_once_with_the_context_of_its_window(tokens, stride, model):
    size = 8
    stream = make_stream(tokens)
    ids = stream[:]
    result = measure_blocks(model, BlockDataset(stream, size, stride, keep_tail=True))
    total, contexts, start, predicted = 0.0, [], 0, 0
    while predicted < tokens - 1:
        # The window reads `size` tokens; its first prediction is the first token the previous window did not reach.
        end = min(start + size, tokens - 1)
        begin = max(end - size, 0)
        for target in range(predicted + 1, end + 1):
            contexts.append(target - begin)
            total += nll_of(model, ids[begin:target], ids[target])
        start, predicted = start + (stride or size), end
    assert result.tokens == len(contexts) == tokens - 1
    assert result.nll == pytest.approx(total, **ROUNDING)
    if stride:
        # After the first window, no token has less context than `size` minus the stride.
        assert min(contexts[size:], default=size) >= size - stride + 1


def test_a_shorter_stride_gives_more_context(model):
    stream = make_stream(50)
    # With stride 1 each token has the full available context: the definition, without windows.
    ids = stream[:]
    full = [nll_of(model, ids[max(target - 8, 0) : target], ids[target]) for target in range(1, 50)]
    assert measure_blocks(model, BlockDataset(stream, 8, 1, keep_tail=True)).loss == pytest.approx(
        np.mean(full), **ROUNDING
    )
    assert abs(measure_blocks(model, BlockDataset(stream, 8, keep_tail=True)).loss - np.mean(full)) > 1e-3


def test_document_boundaries_limit_the_context(model):
    lengths = (5, 9, 1, 6)
    stream = make_stream(21, *lengths)
    result = measure_blocks(model, BlockDataset(stream, 20, document_boundaries=True, keep_tail=True))
    losses = [
        nll_of(model, stream[begin:target], stream[target : target + 1][0])
        for begin, end in zip(stream.offsets[:-1], stream.offsets[1:], strict=True)
        for target in range(begin + 1, end)
    ]
    assert result.tokens == len(losses) == sum(lengths) - len(lengths)
    assert result.nll == pytest.approx(sum(losses), **ROUNDING)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_the_batch_size_does_not_matter(batch_size, model):
    blocks = BlockDataset(make_stream(8 * 4 + 1 + 3), 8, keep_tail=True)
    assert measure_blocks(model, blocks, batch_size).nll == pytest.approx(
        measure_blocks(model, blocks).nll, **ROUNDING
    )


def test_rows_of_plain_and_of_shifted_labels(model):
    ids = torch.from_numpy(make_stream(20)[:].astype(np.int64)).view(2, 10)
    labels = ids.clone()
    labels[0, :4] = -100
    shifted = torch.cat([labels[:, 1:], torch.tensor([[-100], [5]])], dim=1)
    expected = [
        [
            nll_of(model, ids[row, : position + 1].numpy(), target) if target != -100 else 0.0
            for position, target in row_of
        ]
        for row, row_of in enumerate([list(enumerate(targets.tolist())) for targets in shifted])
    ]
    with torch.no_grad():
        sums, counts = row_nll(model, {"input_ids": ids, "labels": labels, "shift_labels": shifted})
        plain_sums, plain_counts = row_nll(model, {"input_ids": ids, "labels": labels})
    assert counts.tolist() == [6, 10]
    assert plain_counts.tolist() == [6, 9]
    assert sums.dtype == torch.float64
    assert sums.tolist() == pytest.approx([sum(row) for row in expected], **ROUNDING)
    assert plain_sums.tolist() == pytest.approx([sum(expected[0]), sum(expected[1][:-1])], **ROUNDING)


def test_padding_on_the_left_does_not_count(model):
    ids = torch.from_numpy(make_stream(6)[:].astype(np.int64))[None]
    padded = {
        "input_ids": nn.functional.pad(ids, (3, 0)),
        "attention_mask": torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1]]),
        "labels": nn.functional.pad(ids, (3, 0), value=-100),
    }
    padded["labels"][0, 3] = -100  # the first token has no context
    expected = [nll_of(model, ids[0, :target].numpy(), ids[0, target]) for target in range(1, 6)]
    with torch.no_grad():
        sums, counts = row_nll(model, padded)
    assert counts.item() == 5
    assert sums.item() == pytest.approx(sum(expected), **ROUNDING)


def test_derived_metrics():
    result = Perplexity(nll=12 * math.log(2), tokens=6, bytes=8)
    assert result.loss == pytest.approx(2 * math.log(2), rel=1e-15)
    assert result.perplexity == pytest.approx(4, rel=1e-15)
    assert result.bits_per_byte == pytest.approx(12 / 8, rel=1e-15)
    assert result.to_dict() == {
        "eval_loss": result.loss,
        "eval_perplexity": result.perplexity,
        "eval_tokens": 6,
        "eval_bits_per_byte": result.bits_per_byte,
        "eval_bytes": 8,
    }
    unknown = Perplexity(nll=1.0, tokens=2)
    assert unknown.bits_per_byte is None
    assert unknown.to_dict("test").keys() == {"test_loss", "test_perplexity", "test_tokens"}


def test_perplexity_beyond_float64_is_infinite():
    assert Perplexity(nll=1e5, tokens=1).perplexity == math.inf
    assert Perplexity(nll=6.9e4, tokens=100).perplexity == math.exp(690)


def test_dropout_is_off_and_the_mode_is_restored(model, tiny_config):
    dropping = HfGPTForCausalLM(tiny_config(embd_pdrop=0.5))
    dropping.load_state_dict(model.state_dict())
    blocks = BlockDataset(make_stream(30), 8, keep_tail=True)
    expected = measure_blocks(model, blocks)
    assert not model.training
    assert measure_blocks(dropping.train(), blocks) == expected
    assert dropping.training
    assert measure_blocks(dropping.eval(), blocks) == expected
    assert not dropping.training


@pytest.mark.parametrize("batches", [[], [{"input_ids": torch.tensor([[1, 2]]), "labels": torch.full((1, 2), -100)}]])
def test_nothing_to_predict_is_an_error(batches, model):
    model.train()
    with pytest.raises(ValueError, match="no tokens to predict"):
        measure_perplexity(model, batches)
    assert model.training
    model.eval()


def test_rows_of_all_processes_count(model):
    batches = list(DataLoader(BlockDataset(make_stream(33), 8), batch_size=2, collate_fn=default_data_collator))
    expected = measure_perplexity(model, batches)
    # As if another process had the first row of each batch.
    more = measure_perplexity(
        model,
        batches,
        spread=lambda function, batches: (tuple(torch.cat([r, r[:1]]) for r in function(batch)) for batch in batches),
    )
    first_rows = [row_nll(model, batch)[0][0].item() for batch in batches]
    assert (expected.tokens, more.tokens) == (32, 32 + 16)
    assert more.nll == pytest.approx(expected.nll + sum(first_rows), **ROUNDING)


def test_half_precision_logits_are_summed_in_full_precision():
    class Flat(nn.Module):
        """Predicts a uniform distribution in bfloat16, where sums of this many numbers would be off by a percent."""

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, input_ids, use_cache):
            return CausalLMOutputWithPast(logits=torch.zeros(*input_ids.shape, VOCAB_SIZE, dtype=torch.bfloat16))

    ids = torch.zeros(4, 1000, dtype=torch.long)
    assert measure_perplexity(Flat(), [{"input_ids": ids, "shift_labels": ids}]).loss == pytest.approx(
        math.log(VOCAB_SIZE), **ROUNDING
    )
