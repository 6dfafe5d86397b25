"""Models with random weights, and `hfgpt serve` in a process of its own."""

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from hfgpt import HfGPTConfig, HfGPTForCausalLM
from hfgpt.data.templates import render_letters, set_chat_template
from hfgpt.known_answers import record_answers
from hfgpt.models import hash_weights
from hfgpt.tokenizer import train_tokenizer

CONTEXT = 320


def save_model(folder: Path, template: str | None) -> str:
    """Saves a model that never generates end of text, so that answers reach their limit."""
    text = render_letters(template or "alpaca") + "".join(map(chr, range(32, 127)))
    tokenizer = train_tokenizer([text], kind="char")
    if template:
        set_chat_template(tokenizer, template)
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": CONTEXT}
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    # Weights so large that the most likely tokens depend on the whole text.
    model = HfGPTForCausalLM(HfGPTConfig(vocab_size=len(tokenizer), initializer_range=0.3, **special, **size)).eval()
    with torch.no_grad():
        model.lm_head.weight[tokenizer.all_special_ids] = 0  # never the largest logits
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    record_answers(model, tokenizer, hash_weights(folder)).write(folder)
    return str(folder)


@contextlib.contextmanager
def serving(*arguments: str) -> Iterator[tuple[str, subprocess.Popen]]:
    """The first line that `hfgpt serve` prints, and its process, which must end as after Ctrl-C."""
    command = [sys.executable, "-m", "hfgpt", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        url = process.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:"), process.stderr.read()
        yield url, process
        assert process.poll() is None, process.stderr.read()
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 130
        assert errors.endswith("hfgpt: stopped\n")
        assert "Traceback" not in errors, errors
        assert time.monotonic() - started < 30
    finally:
        process.kill()
        process.wait()
