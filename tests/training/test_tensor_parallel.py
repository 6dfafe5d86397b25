"""Models divided among processes; runs on two of them are in tests/runs/test_processes.py."""

import copy
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.distributed.tensor import DTensor, init_device_mesh

from hfgpt.errors import InputError
from hfgpt.modeling_hfgpt import HfGPTForSequenceClassification
from hfgpt.training.sharding import gather_whole
from hfgpt.training.tensor_parallel import HeadDropout, check_divisible, divide_model


@pytest.fixture
def mesh(tmp_path):
    """A mesh of one process, on which models are divided as on many."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    "fields", [{}, {"tie_word_embeddings": False}, {"qkv_bias": False}, {"num_labels": 3, "pad_token_id": 0}]
)
def test_a_divided_model_has_the_same_outputs_and_gradients(fields, mesh, make_model, tiny_config):
    classifies = "num_labels" in fields
    whole = HfGPTForSequenceClassification(tiny_config(**fields)) if classifies else make_model(**fields)
    whole.eval()
    whole.base_model.layers[0].mlp.up_proj.weight.requires_grad = False
    divided = copy.deepcopy(whole)
    divide_model(divided, mesh)
    ids = torch.randint(1, whole.config.vocab_size, (3, 9), generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 2, 1]) if classifies else ids
    expected, found = (model(ids, labels=labels) for model in (whole, divided))
    torch.testing.assert_close(found.logits, expected.logits)
    expected.loss.backward()
    found.loss.backward()
    weights = dict(divided.named_parameters())
    assert list(weights) == [name for name, _ in whole.named_parameters()], "the order of the optimizer's state"
    for name, weight in whole.named_parameters():
        assert isinstance(weights[name], DTensor), name
        assert weights[name].requires_grad == weight.requires_grad
        if weight.requires_grad:
            torch.testing.assert_close(gather_whole(weights[name].grad), weight.grad, msg=name)


def test_heads_of_different_processes_have_different_dropout():
    draws = []
    for rank in (0, 1):
        mesh = SimpleNamespace(device_type="cpu", get_local_rank=lambda rank=rank: rank)
        torch.manual_seed(1)
        before, dropout = torch.rand(3), HeadDropout(mesh)
        dropout.begin(None, ())
        own = torch.rand(3)
        dropout.end(None, ())
        draws.append([before, own, torch.rand(3)])
    (first, second) = draws
    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[1], second[1]), "in attention"
    assert torch.equal(first[2], second[2])
    assert not torch.equal(first[0], first[2])


def test_attention_dropout_is_drawn_apart(mesh, make_model):
    model = make_model(attn_pdrop=0.5)
    divide_model(model, mesh)
    torch.manual_seed(1)
    model.train()(torch.ones(1, 4, dtype=torch.long))
    after = torch.rand(1)
    torch.manual_seed(1)
    for _ in model.model.layers:
        torch.randint(2**62, ())  # the only draw from the common random state
    assert torch.equal(after, torch.rand(1))


def test_a_model_that_cannot_be_divided_is_refused(make_model):
    model = make_model(num_attention_heads=2)
    with pytest.raises(InputError, match=r"^model\.num_attention_heads is 2, which cannot be divided among 4 "):
        check_divisible(model, 4)
    with pytest.raises(InputError, match=r"^model\.intermediate_size is 37, which cannot be divided among 2 "):
        check_divisible(make_model(intermediate_size=37), 2)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(InputError, match=r"^adapters cannot be trained with tensor parallelism: "):
        check_divisible(adapted, 2)
