"""Tools that rely on transformers' model interface: compilation, export, tensor parallelism, quantization.

`CLOSE`: caches and sums over two processes change the order of float32 sums, which changes these logits, of about 5 at
most, by up to 3e-6. What a tool does not change is compared exactly.
"""

import copy
import os
import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch.export import Dim, export
from torch.testing import assert_close

from hfgpt import HfGPTForCausalLM, HfGPTForSequenceClassification

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture
def model(tiny_config):
    torch.manual_seed(0)
    torch.compiler.reset()
    model = HfGPTForCausalLM(tiny_config(bos_token_id=None, eos_token_id=None)).eval()
    model.generation_config.pad_token_id = 0
    return model


def make_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 64, shape, generator=torch.Generator().manual_seed(seed))


def make_mask(rows: int, length: int, *missing: int) -> torch.Tensor:
    """All ones except for `missing` padding tokens at the left of each row."""
    mask = torch.ones(rows, length, dtype=torch.long)
    for row, count in enumerate(missing):
        mask[row, :count] = 0
    return mask


PACKED = torch.cat([torch.arange(11), torch.arange(9)]).expand(2, -1)


# Compilation into one graph, run as is: generating code with inductor is not tested here, and takes 15 s


def test_compiled_training_step_of_packed_rows(model):
    """Forward and backward pass with two documents per row and padding in the first row."""
    ids = make_ids(2, 20)
    arguments = {"attention_mask": make_mask(2, 20, 5), "position_ids": PACKED, "labels": ids, "use_cache": False}
    results = []
    for function in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        output = function(ids, **arguments)
        output.loss.backward()
        results.append([output.loss, output.logits, *(weight.grad.clone() for weight in model.parameters())])
    for expected, compiled in zip(*results, strict=True):
        assert_close(compiled, expected, **CLOSE)


def test_compiled_generation_with_a_static_cache(model):
    """With a left-padded batch; two graphs suffice for all 8 steps: one for the prompt, one for the later tokens."""
    ids, mask = make_ids(2, 10), make_mask(2, 10, 0, 6)
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": mask}
    expected = model.generate(ids, **options)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    model.forward = torch.compile(model.forward, fullgraph=True, backend=backend)
    assert torch.equal(model.generate(ids, cache_implementation="static", **options), expected)
    assert len(graphs) == 2


# Export


@torch.no_grad()
def test_export_serves_every_batch_size_and_length(model):
    names = {"use_cache": None} | {
        name: {0: Dim("batch", max=8), 1: Dim("length", max=32)} for name in ("input_ids", "attention_mask")
    }
    arguments = {"attention_mask": make_mask(2, 20, 5), "use_cache": False}
    exported = export(model, (make_ids(2, 20),), arguments, dynamic_shapes=names).module()
    for rows, length in ((2, 20), (3, 13), (5, 32)):
        ids, mask = make_ids(rows, length, seed=length), make_mask(rows, length, 0, 4)
        expected = model(ids, attention_mask=mask).logits
        logits = exported(ids, attention_mask=mask, use_cache=False).logits
        assert_close(logits[mask.bool()], expected[mask.bool()], **CLOSE)


@torch.no_grad()
def test_export_of_packed_rows(model):
    ids = make_ids(2, 20)
    exported = export(model, (ids,), {"position_ids": PACKED, "use_cache": False}).module()
    for position_ids in (PACKED, torch.arange(20).expand(2, -1)):
        expected = model(ids, position_ids=position_ids).logits
        assert_close(exported(ids, position_ids=position_ids, use_cache=False).logits, expected, **CLOSE)


@torch.no_grad()
def test_export_of_a_classifier(tiny_config):
    torch.manual_seed(0)
    model = HfGPTForSequenceClassification(tiny_config(num_labels=5, pad_token_id=0)).eval()
    ids = make_ids(2, 20)
    exported = export(model, (ids,), {"attention_mask": make_mask(2, 20, 5), "use_cache": False}).module()
    mask = make_mask(2, 20, 0, 3).flip(1)  # with padding on the other side
    assert_close(
        exported(ids, attention_mask=mask, use_cache=False).logits, model(ids, attention_mask=mask).logits, **CLOSE
    )


# Pipeline parallelism


class Elsewhere(torch.nn.Identity):
    """A module of another stage, as vLLM has it."""

    def forward(self, *args, **kwargs):
        return args[0]


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_the_stages_of_a_pipeline_compute_the_model(tied, tiny_config):
    """With tied embeddings, vLLM keeps all modules before the blocks in the last stage, which has the head."""
    torch.manual_seed(0)
    whole = HfGPTForCausalLM(tiny_config(tie_word_embeddings=tied)).eval().model
    names = list(whole._pp_plan)
    blocks = names.index("layers")
    assert set(names) == {name for name, module in whole.named_children() if [*module.parameters()]}
    stages = [copy.deepcopy(whole) for _ in range(2)]
    for number, stage in enumerate(stages):
        for name in names[:blocks] if number == 1 and not tied else names[blocks + 1 :] if number == 0 else ():
            setattr(stage, name, Elsewhere())
        stage.layers[1 - number] = Elsewhere()
    ids, positions = make_ids(1, 20), {"position_ids": PACKED[:1], "use_cache": False}
    hidden_states = stages[0](ids, **positions).last_hidden_state
    found = stages[1](inputs_embeds=hidden_states, **positions).last_hidden_state
    assert torch.equal(found, whole(ids, **positions).last_hidden_state)


# Tensor parallelism

PARALLEL = """
import os, sys
import torch
from hfgpt import HfGPTForCausalLM
from hfgpt.training.sharding import gather_whole
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

folder, port = sys.argv[1:]
# What torchrun sets; two forks share one import of torch.
child = os.fork()
rank = "0" if child else "1"
os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
status = 1
try:
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=2)).eval()
    for block in model.model.layers:
        sharded = {name: weight for name, weight in block.named_parameters() if type(weight) is DTensor}
        shapes = {name: weight.to_local().shape for name, weight in sharded.items()}
        for name in ("q_proj", "k_proj", "v_proj"):
            assert shapes[f"self_attn.{name}.weight"] == (16, 32), shapes
            assert shapes[f"self_attn.{name}.bias"] == (16,), shapes
        assert shapes["self_attn.o_proj.weight"] == (32, 16), shapes
        assert shapes["mlp.up_proj.weight"] == (64, 32), shapes
        assert shapes["mlp.down_proj.weight"] == (32, 64), shapes
    recorded = load_file(f"{folder}/recorded.safetensors")
    ids, mask = recorded["ids"], recorded["mask"]
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(logits[mask.bool()], recorded["logits"][mask.bool()], atol=1e-5, rtol=1e-5)
    generated = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    assert torch.equal(generated, recorded["generated"])
    for options in ({"tp_size": 2}, {"fsdp_size": 2}):
        config = DistributedConfig(**options)
        converted = AutoModelForCausalLM.from_pretrained(f"{folder}/gpt2", distributed_config=config)
        for name, weight in HfGPTForCausalLM.from_pretrained(folder).named_parameters():
            assert torch.equal(gather_whole(converted.get_parameter(name)), weight), (options, name)
    torch.distributed.destroy_process_group()
    status = 0
finally:
    if not child:
        os._exit(status)
assert os.waitpid(child, 0)[1] == 0
"""


def test_tensor_parallelism_over_two_processes(model, tmp_path):
    """As started by `torchrun --nproc-per-node 2`, with gloo. About 8 s, mostly for importing torch."""
    ids, mask = make_ids(2, 20), make_mask(2, 20, 5)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
    generated = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    model.save_pretrained(tmp_path)
    recorded = {"ids": ids, "mask": mask, "logits": logits, "generated": generated}
    save_file(recorded, tmp_path / "recorded.safetensors")
    model.save_pretrained(tmp_path / "gpt2", save_original_format=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    run = subprocess.run(
        [sys.executable, "-c", PARALLEL, str(tmp_path), port],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr


# Quantization: run where the `quantization` extra is installed


def check_quantized(model, loaded, dequantize, relative_error: float):
    """Only the projections of the blocks are quantized, and the logits match the dequantized weights."""
    projections = {
        f"{name}.weight" for name, module in model.model.layers.named_modules(prefix="model.layers") if "proj" in name
    }
    assert len(projections) == 12
    plain = dict(model.named_parameters())
    for name, weight in loaded.named_parameters():
        if name not in projections:
            assert torch.equal(weight, plain[name]), name
            continue
        assert type(weight) is not torch.nn.Parameter, name
        meant = dequantize(weight)
        error = (meant - plain[name]).abs().max() / plain[name].abs().max()
        assert 0 < error < relative_error, name
        plain[name].data = meant
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    ids = make_ids(2, 20)
    with torch.no_grad():
        # Dequantized on the fly, here in float32: the same numbers multiplied in another order.
        assert_close(loaded(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)
    assert loaded.generate(ids, max_new_tokens=3, do_sample=False).shape == (2, 23)


@pytest.fixture
def saved(tiny_config, tmp_path):
    """A model of width 64, the smallest for 4-bit blocks, and its folder."""
    torch.manual_seed(0)
    model = HfGPTForCausalLM(tiny_config(hidden_size=64, pad_token_id=0)).eval()
    model.save_pretrained(tmp_path)
    return model, tmp_path


def test_torchao_int8_loads(saved):
    torchao = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    model, folder = saved
    quantization = TorchAoConfig(torchao.Int8WeightOnlyConfig())
    loaded = HfGPTForCausalLM.from_pretrained(folder, quantization_config=quantization).eval()
    # Half a quantization step of 255, plus the rounding of the scale.
    check_quantized(model, loaded, lambda weight: weight.dequantize(), 1 / 250)


@pytest.fixture
def load_in_4_bits(saved):
    """Loads the saved model in 4 bits, with or without the kernel of bitsandbytes for CPUs with bfloat16 units."""
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    settings = {"quantization_config": quantization, "device_map": {"": "cpu"}}

    def load(kernel: bool) -> HfGPTForCausalLM:
        loaded = HfGPTForCausalLM.from_pretrained(saved[1], **settings).eval()
        for module in loaded.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = kernel
        return loaded

    return load


def test_bitsandbytes_4_bit_loads(saved, load_in_4_bits):
    from bitsandbytes.functional import dequantize_4bit

    # Half the widest gap of nf4 is 0.152 of a block's largest weight.
    check_quantized(
        saved[0],
        load_in_4_bits(kernel=False),
        lambda weight: dequantize_4bit(weight.data, weight.quant_state).view(weight.quant_state.shape),
        0.16,
    )


def test_bitsandbytes_4_bit_kernel_computes_in_bfloat16(load_in_4_bits):
    from bitsandbytes import functional

    if not getattr(functional, "has_avx512bf16", lambda: False)():
        pytest.skip("this CPU has no bfloat16 units, or bitsandbytes no kernel for them")
    ids = make_ids(2, 20)
    with torch.no_grad():
        exact, fast = load_in_4_bits(kernel=False)(ids).logits, load_in_4_bits(kernel=True)(ids).logits
    # bfloat16 rounds by up to 1/256; twelve models gave 0.008 to 0.011.
    assert 0 < (fast - exact).norm() / exact.norm() < 0.02
