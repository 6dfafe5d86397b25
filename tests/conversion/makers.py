"""Small random checkpoints in the three formats, and the models they were made from."""

import math

import torch
from torch import nn
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

VOCAB, CONTEXT, WIDTH, HEADS, LAYERS = 90, 40, 48, 4, 2


def randomize(module: nn.Module, std: float = 0.2, seed: int = 0) -> nn.Module:
    """Sets every parameter to random values, biases and norms too, so that a swapped or missing one is noticed."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data.normal_(0, std, generator=generator)
    return module.eval()


def make_gpt2(head: str = "lm", **changes) -> GPT2LMHeadModel | GPT2ForSequenceClassification:
    sizes = {"vocab_size": VOCAB, "n_positions": CONTEXT, "n_embd": WIDTH, "n_head": HEADS, "n_layer": LAYERS}
    tokens = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 2}
    config = GPT2Config(**{**sizes, **tokens, **changes})
    return randomize({"lm": GPT2LMHeadModel, "classifier": GPT2ForSequenceClassification}[head](config))


class NanoGPT(nn.Module):
    """nanoGPT's module names and computation."""

    def __init__(self, vocab_size=VOCAB, bias=True, block_size=CONTEXT, n_embd=WIDTH, n_head=HEADS, n_layer=LAYERS):
        super().__init__()
        self.n_head = n_head

        def norm():
            return nn.LayerNorm(n_embd, bias=bias)

        def block():
            attn = nn.ModuleDict(
                {"c_attn": nn.Linear(n_embd, 3 * n_embd, bias), "c_proj": nn.Linear(n_embd, n_embd, bias)}
            )
            # The causal mask that nanoGPT registers when PyTorch has no flash attention.
            attn.register_buffer("bias", torch.tril(torch.ones(block_size, block_size))[None, None])
            mlp = {"c_fc": nn.Linear(n_embd, 4 * n_embd, bias), "c_proj": nn.Linear(4 * n_embd, n_embd, bias)}
            return nn.ModuleDict({"ln_1": norm(), "attn": attn, "ln_2": norm(), "mlp": nn.ModuleDict(mlp)})

        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocab_size, n_embd),
                "wpe": nn.Embedding(block_size, n_embd),
                "h": nn.ModuleList(block() for _ in range(n_layer)),
                "ln_f": norm(),
            }
        )
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight

    def forward(self, ids):
        x = self.transformer.wte(ids) + self.transformer.wpe(torch.arange(ids.shape[1]))
        for block in self.transformer.h:
            q, k, v = block.attn.c_attn(block.ln_1(x)).chunk(3, dim=-1)
            batch, length, width = q.shape
            q, k, v = (part.view(batch, length, self.n_head, -1).transpose(1, 2) for part in (q, k, v))
            scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
            scores = scores.masked_fill(block.attn.bias[:, :, :length, :length] == 0, -math.inf)
            attended = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, width)
            x = x + block.attn.c_proj(attended)
            x = x + block.mlp.c_proj(nn.functional.gelu(block.mlp.c_fc(block.ln_2(x))))
        return self.lm_head(self.transformer.ln_f(x))


def save_nanogpt(path, bias=True, vocab_size=VOCAB, compiled=True, **settings) -> NanoGPT:
    """What nanoGPT's train.py saves: the weights, optimizer state, arguments and settings."""
    model = randomize(NanoGPT(vocab_size, bias))
    arguments = {"n_layer": LAYERS, "n_head": HEADS, "n_embd": WIDTH, "block_size": CONTEXT, "bias": bias}
    prefix = "_orig_mod." if compiled else ""
    content = {
        "model": {f"{prefix}{name}": tensor for name, tensor in model.state_dict().items()},
        "optimizer": torch.optim.AdamW(model.parameters()).state_dict(),
        "model_args": {**arguments, "vocab_size": vocab_size, "dropout": 0.25},
        "iter_num": 7,
        "best_val_loss": torch.tensor(1.5),
        "config": {"dataset": "letters", **settings},
    }
    torch.save(content, path)
    return model


def make_book_weights(qkv_bias=False, tied=False, masks=True, classes=None) -> dict[str, torch.Tensor]:
    """A state dict with the parameter names of the book's model."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.empty(shape).normal_(0, 0.2, generator=generator)

    weights = {"tok_emb.weight": draw(VOCAB, WIDTH), "pos_emb.weight": draw(CONTEXT, WIDTH)}
    for number in range(LAYERS):
        block = f"trf_blocks.{number}"
        for name in ("W_query", "W_key", "W_value"):
            weights[f"{block}.att.{name}.weight"] = draw(WIDTH, WIDTH)
            if qkv_bias:
                weights[f"{block}.att.{name}.bias"] = draw(WIDTH)
        for name, rows, columns in (
            ("att.out_proj", WIDTH, WIDTH),
            ("ff.layers.0", 4 * WIDTH, WIDTH),
            ("ff.layers.2", WIDTH, 4 * WIDTH),
        ):
            weights |= {f"{block}.{name}.weight": draw(rows, columns), f"{block}.{name}.bias": draw(rows)}
        for name in ("norm1", "norm2"):
            weights |= {f"{block}.{name}.scale": draw(WIDTH), f"{block}.{name}.shift": draw(WIDTH)}
        if masks:
            weights[f"{block}.att.mask"] = torch.triu(torch.ones(CONTEXT, CONTEXT), diagonal=1)
    weights |= {"final_norm.scale": draw(WIDTH), "final_norm.shift": draw(WIDTH)}
    weights["out_head.weight"] = weights["tok_emb.weight"].clone() if tied else draw(VOCAB, WIDTH)
    if classes:
        weights |= {"out_head.weight": draw(classes, WIDTH), "out_head.bias": draw(classes)}
    return weights


def add_lora(weights: dict[str, torch.Tensor], rank: int = 3) -> dict[str, torch.Tensor]:
    """The same weights with every linear layer wrapped in LoRA as in appendix E."""
    generator = torch.Generator().manual_seed(4)
    wrapped = {}
    for name, tensor in weights.items():
        module, _, parameter = name.rpartition(".")
        if tensor.ndim != 2 or "emb" in name or "mask" in name:
            is_bias_of_linear = parameter == "bias"
            wrapped[f"{module}.linear.bias" if is_bias_of_linear else name] = tensor
            continue
        rows, columns = tensor.shape
        wrapped[f"{module}.linear.weight"] = tensor
        wrapped[f"{module}.lora.A"] = torch.empty(columns, rank).normal_(0, 0.2, generator=generator)
        wrapped[f"{module}.lora.B"] = torch.empty(rank, rows).normal_(0, 0.2, generator=generator)
    return wrapped
