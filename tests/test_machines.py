"""The machine files: read by the tools they are for, run with stubs, and one of them launched for real on the CPU."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from torch.distributed.run import get_args_parser

from hfgpt.errors import InputError
from hfgpt.modeling_hfgpt import HfGPTPreTrainedModel
from hfgpt.recipe import find_recipe, recipe_folder
from hfgpt.recipe_keys import check_overrides, section_keys
from hfgpt.records import RunRecord
from hfgpt.training.arguments import HfGPTTrainingArguments

FOLDER = recipe_folder() / "machines"
ACCELERATE = {"ddp.yaml": (8, 1), "fsdp.yaml": (8, 1), "tensor-parallel.yaml": (4, 1), "two-machines.yaml": (16, 2)}
OTHERS = ("slurm.sbatch", "skypilot.yaml", "kubeflow.yaml")
# Stands for python and torchrun: records its arguments and some variables; with WAIT, exits as hfgpt does on SIGUSR1.
STUB = """#!/bin/bash
trap 'exit 130' USR1 TERM
printf '%s\\n' "$(basename "$0")" "$@" > "$RECORD.$$"
env > "$RECORD.env"
mv "$RECORD.$$" "$RECORD"
while [[ $WAIT ]]; do sleep 0.05; done
"""


def commands_of(name: str) -> list[list[str]]:
    """The words of each command in the comment at the top of a file."""
    lines = re.findall(r"^#   (\S+(?: \S+)*)", (FOLDER / name).read_text(), re.MULTILINE)
    assert lines, name
    return [shlex.split(line) for line in lines]


def check_train(words: list[str]):
    """Checks a recipe and overrides; recipes of the user do not exist here."""
    recipe, *overrides = words
    task = "pretrain" if recipe == "my-gpt.yaml" else yaml.safe_load(find_recipe(recipe).read_text())["task"]
    check_overrides(overrides, {"task": None, **section_keys(task)})


def parse_launcher(words: list[str]) -> tuple[int, int]:
    """Parses a command of accelerate or torchrun as they do; returns the numbers of processes and machines."""
    if words[0] == "torchrun":
        parsed = get_args_parser().parse_args(words[1:])
        machines = int(parsed.nnodes.removeprefix("1:"))  # by default, 1:1
        processes = machines * int(parsed.nproc_per_node)
    else:
        assert words[:2] == ["accelerate", "launch"]
        with mock.patch.dict(os.environ):  # _validate_launch_command sets OMP_NUM_THREADS
            parsed, *_ = _validate_launch_command(launch_command_parser().parse_args(words[2:]))
        machines, processes = parsed.num_machines, parsed.num_processes
    assert (parsed.module, parsed.training_script) == (True, "hfgpt")
    assert parsed.training_script_args[0] == "train"
    check_train(parsed.training_script_args[1:])
    return processes, machines


def test_the_commands_in_the_readme_are_those_of_the_files(monkeypatch):
    monkeypatch.chdir(recipe_folder().parent)
    lines = Path("README.md").read_text().splitlines()
    launchers = [shlex.split(line) for line in lines if line.startswith(("torchrun ", "accelerate launch "))]
    found = [parse_launcher(words) for words in launchers]
    assert found == [(4, 1), (4, 1), (4, 1), (4, 1), (16, 2)]
    others = {line.split()[0]: line for line in lines if line.startswith(("sbatch ", "sky ", "kubectl "))}
    assert len(others) == 3
    for name in OTHERS:
        tool, *_ = commands_of(name)[0]
        assert f"recipes/machines/{name}" in others[tool]
    check_train(shlex.split(others["sbatch"])[2:])


def test_every_machine_file_is_tested_and_says_what_it_is_for():
    assert {path.name for path in FOLDER.iterdir()} == {*ACCELERATE, *OTHERS}
    for path in FOLDER.iterdir():
        lines = path.read_text().removeprefix("#!/bin/bash\n").splitlines()
        assert re.fullmatch(r"# [A-Z].*[).]", lines[0]), path
        assert "# Change: " in path.read_text(), path
        assert max(map(len, lines)) <= 119, path


@pytest.mark.parametrize("name", ACCELERATE)
def test_accelerate_reads_its_files_and_their_commands(name, monkeypatch):
    monkeypatch.chdir(recipe_folder().parent)
    config = load_config_from_file(str(FOLDER / name))
    assert config.mixed_precision == "no", "a string, and not the boolean that YAML reads from an unquoted no"
    for words in commands_of(name):
        assert parse_launcher(words) == ACCELERATE[name], words


def launched_environment(name: str) -> dict[str, str]:
    """What a process gets from `accelerate launch --config_file`."""
    words = ["--config_file", str(FOLDER / name), "--main_process_port", "0", "-m", "hfgpt"]
    with mock.patch.dict(os.environ):
        parsed, *_ = _validate_launch_command(launch_command_parser().parse_args(words))
        return prepare_multi_gpu_env(parsed)


def test_fsdp_shards_the_blocks_with_version_2():
    with mock.patch.dict(os.environ, launched_environment("fsdp.yaml")):
        plugin = FullyShardedDataParallelPlugin()
    assert (plugin.fsdp_version, plugin.reshard_after_forward) == (2, True)
    assert plugin.transformer_cls_names_to_wrap == HfGPTPreTrainedModel._no_split_modules
    assert plugin.state_dict_type.name == "SHARDED_STATE_DICT"
    assert not plugin.activation_checkpointing
    assert not plugin.cpu_ram_efficient_loading


def test_tensor_parallelism_covers_all_processes(monkeypatch):
    pytest.importorskip("transformers", "5.23")
    monkeypatch.setattr(HfGPTTrainingArguments, "world_size", 4)
    with mock.patch.dict(os.environ, launched_environment("tensor-parallel.yaml")):
        arguments = HfGPTTrainingArguments("none", use_cpu=True)
        assert "ACCELERATE_USE_PARALLELISM_CONFIG" not in os.environ, "accelerate would refuse it on a CPU"
    assert (arguments.parallelism_config.tp_size, arguments.data_processes) == (4, 1)


def test_several_machines_meet_at_the_address_of_the_first(monkeypatch):
    parser = launch_command_parser()
    words = [*commands_of("two-machines.yaml")[1][2:]]
    monkeypatch.chdir(recipe_folder().parent)
    with mock.patch.dict(os.environ):
        parsed, *_ = _validate_launch_command(parser.parse_args(words))
        prepare_multi_gpu_env(parsed)  # translates the options into those of torchrun
    assert (parsed.node_rank, parsed.nnodes, parsed.nproc_per_node) == (1, "2", "8")
    assert (parsed.rdzv_backend, parsed.rdzv_endpoint) == ("static", "10.0.0.1:29500")


def test_a_precision_that_accelerate_would_silently_change_is_refused(monkeypatch, tmp_path):
    def arguments(**values):
        return HfGPTTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **values)

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert arguments(bf16=True).mixed_precision == "bf16"
    with pytest.raises(InputError, match=r"mixed_precision is bf16 in the accelerate file, but training\.bf16 is "):
        arguments(bf16=False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert arguments(bf16=True).mixed_precision == "bf16", "the recipe decides"


@pytest.fixture
def stubs(tmp_path):
    """A folder with commands that only record how they are called, and an environment that uses them."""
    for name in ("python", "torchrun"):
        (tmp_path / name).write_text(STUB)
    # SLURM's commands. srun forwards signals to its tasks; here it becomes the task of the second GPU.
    (tmp_path / "srun").write_text(
        '#!/bin/bash\nprintf "%s\\n" "$@" > "$RECORD.srun"\nwhile [[ $1 == --* ]]; do shift; done\n'
        'SLURM_PROCID=9 SLURM_LOCALID=1 exec "$@"\n'
    )
    (tmp_path / "scontrol").write_text(
        '#!/bin/bash\nif [[ $1 == requeue ]]; then echo "$2" > "$RECORD.requeued"; else echo node-1; echo node-2; fi\n'
    )
    for path in tmp_path.iterdir():
        path.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path), "WAIT": ""}
    return tmp_path, environment | {"RECORD": str(tmp_path / "record")}


def run_twice(script: list[str], stubs, run: Path) -> list[str]:
    """The words of a script's command; at its second start, it has to resume."""
    folder, environment = stubs

    def words() -> list[str]:
        subprocess.run(script, env=environment, cwd=folder, check=True, capture_output=True, timeout=60)
        return (folder / "record").read_text().splitlines()

    first = words()
    run.mkdir(parents=True)
    (run / "recipe.yaml").touch()
    assert words() == [*first, "--resume"]
    return first


def test_the_skypilot_task_trains_and_resumes(stubs, monkeypatch):
    folder, environment = stubs
    task = yaml.safe_load((FOLDER / "skypilot.yaml").read_text())
    assert list(task["file_mounts"]) == ["/runs"]
    (folder / "hfgpt-venv/bin").mkdir(parents=True)
    (folder / "hfgpt-venv/bin/activate").touch()
    environment |= {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NUM_GPUS_PER_NODE": "8"}
    environment |= {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "RECIPE": task["envs"]["RECIPE"]}
    script = task["run"].replace("/runs/", f"{folder}/runs/")
    words = run_twice(["bash", "-c", script], stubs, folder / "runs/gpt2-124m")
    assert parse_launcher(words) == (16, 2)
    parsed = get_args_parser().parse_args(words[1:])
    assert (parsed.node_rank, parsed.master_addr, parsed.master_port) == (1, "10.0.0.1", 29500)
    (command,) = commands_of("skypilot.yaml")
    assert command[:3] == ["sky", "jobs", "launch"]
    assert dict([command[-1].split("=")]) == task["envs"]


def test_the_kubeflow_job_trains_and_resumes(stubs, monkeypatch):
    folder, environment = stubs
    job = yaml.safe_load((FOLDER / "kubeflow.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    trainer = job["spec"]["trainer"]
    variables = {entry["name"]: entry["value"] for entry in trainer["env"]}
    (patch,) = job["spec"]["runtimePatches"]
    (replicas,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = replicas["template"]["spec"]["template"]["spec"]
    (mount,) = pod["containers"][0]["volumeMounts"]
    assert all(value.startswith(f"{mount['mountPath']}/") for value in variables.values()), "kept, and shared"
    environment |= {name: value.replace("/shared", str(folder)) for name, value in variables.items()}
    words = run_twice([*trainer["command"], *trainer["args"]], stubs, Path(environment["RUN"]))
    for name, value in {"NNODES": "2", "NPROC_PER_NODE": "8"}.items():  # Kubeflow sets them
        monkeypatch.setenv(f"PET_{name}", value)
    assert parse_launcher(words) == (16, 2)


SLURM = {"SLURM_JOB_ID": "41", "SLURM_JOB_NODELIST": "node-[1-2]", "SLURM_NTASKS": "16"}
SLURM |= {"SLURM_NTASKS_PER_NODE": "8", "SLURM_CPUS_PER_TASK": "8"}


def test_the_slurm_job_starts_a_process_per_gpu_and_resumes(stubs):
    folder, environment = stubs
    environment |= SLURM
    script = ["bash", str(FOLDER / "slurm.sbatch"), "my-gpt.yaml", "--training.run_name", "two words"]
    words = run_twice(script, stubs, folder / "runs/my-gpt")
    assert words[:4] == ["python", "-m", "hfgpt", "train"]
    assert words[4:] == ["my-gpt.yaml", "--training.run_name", "two words", "--training.output_dir", "runs/my-gpt"]
    found = dict(line.partition("=")[::2] for line in (folder / "record.env").read_text().splitlines())
    for name, value in {"RANK": "9", "LOCAL_RANK": "1", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}.items():
        assert found[name] == value
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("node-1", "20041")
    assert not (folder / "record.requeued").exists()
    for words in commands_of("slurm.sbatch"):
        start = words.index("recipes/machines/slurm.sbatch")
        check_train(words[start + 1 :])


@pytest.mark.parametrize(("number", "requeued"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_the_slurm_job_is_requeued_at_its_time_limit_but_not_if_it_is_canceled(stubs, number, requeued):
    folder, environment = stubs
    script = ["bash", str(FOLDER / "slurm.sbatch"), "gpt2-124m"]
    with subprocess.Popen(script, env=environment | SLURM | {"WAIT": "yes"}, cwd=folder) as job:
        while not (folder / "record").exists():
            assert job.poll() is None
            time.sleep(0.05)
        if requeued:
            job.send_signal(number)  # --signal=B: signals the batch script
        else:  # scancel signals the tasks
            child = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True, check=True).stdout
            os.kill(int(child), number)
        assert job.wait(60) == 130
    assert (folder / "record.requeued").exists() is requeued


RECIPE = """
task: pretrain
tokenizer: {kind: char}
model: {hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 1, max_position_embeddings: 32}
data: {path: "synthetic:stories", max_documents: 9, num_proc: 1, cache_dir: cache}
training: {max_steps: 2, global_batch_size: 4, per_device_train_batch_size: 2, use_cpu: true, bf16: false}
evaluation: {prompts: ["The"], max_new_tokens: 2}
"""


def test_accelerate_launches_two_processes_from_a_machine_file(tmp_path):
    """About 20 s, mostly for importing Trainer."""
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    words = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    words += ["--config_file", str(FOLDER / "ddp.yaml"), "--num_processes", "2", "--main_process_port", "0"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    words += ["-m", "hfgpt", "train", "tiny.yaml"]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "; 2 processes; float32; " in done.stderr
    assert RunRecord.read(tmp_path / "runs/tiny").processes == 2
    metrics = json.loads((tmp_path / "runs/tiny/metrics.json").read_text())
    assert metrics["eval_loss"] > 0
