"""Peak memory of training a model of GPT-2 small's size: full fine-tuning, and LoRA of rank 16 on all linear layers.

    python benchmarks/adapter_memory.py

Each case runs in its own process: three AdamW steps on random tokens through Trainer, about 15 minutes in total.
On a CPU the peak is that of the process, including 0.4 GB for the libraries. It is reported twice, with the default
allocator and with one that returns freed memory to the system, which shows what training needs: glibc keeps blocks
below 32 MB once it has seen such blocks freed, and adapters allocate many short-lived ones.
"""

import os
import subprocess
import sys
import tempfile

SHAPES = ((1, 256), (4, 256), (1, 1024))  # rows, tokens per row
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(256 * 1024)}


def train(kind: str, rows: int, length: int) -> int:
    """Peak memory in bytes when training `all` weights or an `adapter`."""
    import torch
    from transformers import AutoModelForCausalLM, set_seed

    import hfgpt
    from hfgpt.adapters import AdapterArguments, attach_adapter
    from hfgpt.training.arguments import HfGPTTrainingArguments
    from hfgpt.training.hardware import peak_memory_bytes
    from hfgpt.training.trainer import HfGPTTrainer

    set_seed(0)
    model = AutoModelForCausalLM.from_config(hfgpt.HfGPTConfig.from_preset("gpt2"))
    if kind == "adapter":
        model = attach_adapter(model, AdapterArguments(r=16), "CAUSAL_LM")
    data = [{"input_ids": ids, "labels": ids} for ids in torch.randint(50257, (3 * rows, length))]
    with tempfile.TemporaryDirectory() as folder:
        arguments = HfGPTTrainingArguments(
            output_dir=folder, max_steps=3, per_device_train_batch_size=rows, save_strategy="no", bf16=False
        )
        HfGPTTrainer(model, arguments, train_dataset=data).train()
        return peak_memory_bytes(arguments.device)


def main():
    for rows, length in SHAPES:
        for name, environment in (("as it is", {}), ("given back", GIVE_BACK)):
            peaks = {}
            for kind in ("all", "adapter"):
                words = [sys.executable, __file__, kind, str(rows), str(length)]
                shown = subprocess.run(words, env=os.environ | environment, capture_output=True, text=True, check=True)
                peaks[kind] = int(shown.stdout.splitlines()[-1]) / 1e9
            print(
                f"{rows} x {length} tokens, {name}: {peaks['all']:.2f} GB all weights, {peaks['adapter']:.2f} GB "
                f"adapter, ratio {peaks['adapter'] / peaks['all']:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(train(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
    else:
        main()
