"""The contenders: the same weights as an hfgpt model, as transformers' GPT-2, and as nanoGPT."""

import contextlib
import importlib.util
import io
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import nn
from transformers import GPT2LMHeadModel, set_seed

from hfgpt import HfGPTConfig, HfGPTForCausalLM
from hfgpt.bench.measuring import GPT2, HFGPT, NANOGPT
from hfgpt.conversion.gpt2 import gpt2_config, gpt2_weights
from hfgpt.errors import InputError

NANOGPT_VOCABULARY = 50304  # nanoGPT pads GPT-2's vocabulary of 50,257 to a multiple of 64


@dataclass(frozen=True)
class Shape:
    """A model, and the batches to train it on.

    Args:
        name: Layers, heads and hidden size, or the name of the model.
        layers, heads, hidden, vocabulary, context: The model.
        length: Tokens per row.
        rows: Rows per batch.
        activation: Of the MLP.
    """

    name: str
    layers: int
    heads: int
    hidden: int
    vocabulary: int
    context: int
    length: int
    rows: int
    activation: str = "gelu_pytorch_tanh"

    def config(self) -> HfGPTConfig:
        """The configuration, without dropout."""
        return HfGPTConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            max_position_embeddings=self.context,
            hidden_act=self.activation,
            embd_pdrop=0.0,
            resid_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=None,
            eos_token_id=None,
        )


SMALL = Shape("4L/4H/128", 4, 4, 128, 65, 64, length=64, rows=12)  # nanoGPT's run on a CPU
BABY = Shape("6L/6H/384", 6, 6, 384, 65, 256, length=256, rows=8)  # nanoGPT's baby GPT
GPT2_SMALL = Shape("124M", 12, 12, 768, 50257, 1024, length=256, rows=2)


def build_models(
    shape: Shape, device: torch.device, nanogpt: Path | None = None, only: str | None = None
) -> dict[str, nn.Module]:
    """Builds the contenders with equal weights, and checks that they compute the same loss.

    Args:
        shape: Their shape.
        device: Where to put them.
        nanogpt: The folder of a checkout of nanoGPT.
        only: Keep only this contender in memory.

    Raises:
        InputError: The folder is not a checkout of nanoGPT.
    """
    set_seed(0)
    ours = HfGPTForCausalLM(shape.config())
    config = gpt2_config(ours.config)
    if shape.activation == "gelu_pytorch_tanh":
        config.activation_function = "gelu_new"  # transformers' default for GPT-2; the same function
    native = GPT2LMHeadModel(config)
    native.load_state_dict(gpt2_weights(dict(ours.state_dict()), native)[0], strict=False)  # the head is tied
    native.tie_weights()
    models = {HFGPT: ours, GPT2: native}
    if nanogpt is not None:
        models[NANOGPT] = _build_nanogpt(import_nanogpt(nanogpt), shape, native)
    models = {name: model.to(device) for name, model in models.items()}
    _check_losses(models, shape)
    return models if only is None else {only: models[only]}


def loss_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The loss of predicting each next token of ids (B, T + 1); all contenders compute it as they do in training."""
    targets = ids[:, 1:].contiguous()
    if isinstance(model, HfGPTForCausalLM | GPT2LMHeadModel):
        options = {"skip_logits": True} if isinstance(model, HfGPTForCausalLM) else {}
        return model(input_ids=ids[:, :-1], labels=targets, shift_labels=targets, use_cache=False, **options).loss
    return model(ids[:, :-1], targets)[1]


def draw_ids(shape: Shape, device: torch.device) -> torch.Tensor:
    """Random ids for a batch: rows of one token more than are predicted."""
    return torch.randint(shape.vocabulary, (shape.rows, shape.length + 1), device=device)


@torch.no_grad()
def _check_losses(models: dict[str, nn.Module], shape: Shape):
    ids = draw_ids(shape, next(models[HFGPT].parameters()).device)
    losses = {name: loss_of(model.eval(), ids).item() for name, model in models.items()}
    # nanoGPT's GELU is always exact, and the probabilities of its 47 additional tokens are not zero.
    tolerances = {GPT2: 1e-4, NANOGPT: 1e-2}
    for name, tolerance in tolerances.items():
        if name in losses and abs(losses[name] - losses[HFGPT]) > tolerance:
            raise RuntimeError(f"the loss of {name} is {losses[name]}, that of hfgpt {losses[HFGPT]}")


def import_nanogpt(folder: Path) -> ModuleType:
    """nanoGPT's module `model`.

    Raises:
        InputError: The folder is not a checkout of nanoGPT.
    """
    file = folder / "model.py"
    if not file.is_file():
        raise InputError(f"--nanogpt '{folder}' has no model.py: pass a checkout of github.com/karpathy/nanoGPT")
    spec = importlib.util.spec_from_file_location("nanogpt_model", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "GPT") or not hasattr(module, "GPTConfig"):
        raise InputError(f"--nanogpt: {file} does not define GPT and GPTConfig: pass a checkout of nanoGPT")
    return module


def _build_nanogpt(module: ModuleType, shape: Shape, native: GPT2LMHeadModel) -> nn.Module:
    rows = NANOGPT_VOCABULARY if shape.vocabulary == GPT2_SMALL.vocabulary else shape.vocabulary
    config = module.GPTConfig(shape.context, rows, shape.layers, shape.heads, shape.hidden, 0.0, True)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its size
        model = module.GPT(config)
    theirs = model.state_dict()
    for name, weight in native.state_dict().items():
        if name in theirs:
            is_transposed = weight.ndim == 2 and ".h." in name  # GPT-2's layers store (inputs, outputs)
            theirs[name][: len(weight.T if is_transposed else weight)].copy_(weight.T if is_transposed else weight)
    return model
