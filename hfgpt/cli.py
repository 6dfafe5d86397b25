"""The command line: parse, call one function, print.

Nothing heavy is imported before a command runs, so that every `--help` answers at once. An error that the user can
fix is one line on stderr and exit status 2; any other exception is a bug and keeps its traceback.
"""

import atexit
import dataclasses
import difflib
import errno
import io
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from hfgpt.errors import STOP_SIGNALS, InputError, Interrupted, make_visible
from hfgpt.saving import check_model_path

app = typer.Typer(
    name="hfgpt",
    help="A GPT written from scratch, fully integrated with the Hugging Face ecosystem.",
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
# An unknown command or option, or a wrong type. typer exports only its subclasses.
UsageError = typer.BadParameter.__base__
TAKES_OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}
RecipeName = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe name (see hfgpt recipes) or the path to a YAML file.")
]


def _existing(model: str) -> str:
    """Checks that a local model exists, before torch is imported."""
    check_model_path(model)
    return model


Model = Annotated[str, typer.Argument(metavar="MODEL", help="A folder or a Hub model id.", callback=_existing)]
OutputFolder = Annotated[Path, typer.Argument(metavar="OUT", help="Output folder (must not exist).")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
Temperature = Annotated[
    float, typer.Option(help="Sampling temperature: below 1 more predictable, above 1 more varied.")
]
TopK = Annotated[int, typer.Option(help="Sample from the k most likely tokens; 0 disables this.")]
TopP = Annotated[float, typer.Option(help="Sample from the most likely tokens whose probabilities add up to this.")]
Greedy = Annotated[bool, typer.Option("--greedy", help="Always choose the most likely token.")]
Fast = Annotated[
    bool,
    typer.Option(
        "--fast",
        help="On a CPU, up to five times as fast for one text at a time. Large models are read in float16, so that "
        "the text can differ.",
    ),
]


def _print_version(requested: bool):
    if requested:
        from hfgpt import __version__

        print(f"hfgpt {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
):
    """The options of `hfgpt` itself."""


@app.command(context_settings=TAKES_OVERRIDES)
def train(
    context: typer.Context,
    recipe: RecipeName,
    resume: Annotated[bool, typer.Option("--resume", help="Resume from the latest checkpoint.")] = False,
    budget: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Choose the best model for this time, such as 5m, and forecast its loss."),
    ] = None,
    on: Annotated[
        str | None,
        typer.Option(metavar="FLAVOR", help="Hardware of HF Jobs to train on; show the job without submitting it."),
    ] = None,
    submit: Annotated[bool, typer.Option("--submit", help="With --on: submit the job.")] = False,
    timeout: Annotated[str | None, typer.Option(help="With --on: time limit of the job (default: 4h).")] = None,
    namespace: Annotated[
        str | None, typer.Option(help="With --on: user or organization that runs the job (default: you).")
    ] = None,
):
    """Train a model from a recipe; override any key with --section.key value."""
    from hfgpt.durations import Budget, parse_duration
    from hfgpt.recipe import load_recipe

    limit = None if budget is None else Budget(parse_duration(budget, "--budget"), _overrides(context))
    job = {"submit": submit, "timeout": timeout, "namespace": namespace}
    if on is not None:
        if limit:
            raise InputError("--budget measures the speed of this machine, not of HF Jobs: leave out --budget or --on")
        from hfgpt.commands.jobs import JobArguments, train_on_job

        arguments = JobArguments(on, **{key: value for key, value in job.items() if value is not None})
        loaded = load_recipe(recipe, _overrides(context), check_paths=True)
        _print(train_on_job(recipe, loaded, context.args, arguments, resume))
        return
    if unused := [key for key, value in job.items() if value]:
        raise InputError(f"--{unused[0]} only applies to HF Jobs: also pass --on FLAVOR, such as --on a10g-small")
    loaded = load_recipe(recipe, _overrides(context), check_paths=True)
    from hfgpt.commands.train import train as train_recipe

    train_recipe(loaded, resume, budget=limit)


@app.command(context_settings=TAKES_OVERRIDES)
def prepare(
    context: typer.Context,
    recipe: RecipeName,
    out: Annotated[
        str,
        typer.Argument(metavar="OUT", help="A folder, or a URL such as s3://bucket/data or hf://buckets/me/data."),
    ],
    shard: Annotated[
        str | None,
        typer.Option(metavar="I/N", help="Prepare one of N shares, such as 2/8: N machines with the same files."),
    ] = None,
    as_json: AsJson = False,
):
    """Tokenize the text of a pre-training recipe, of any size, for hfgpt train RECIPE --data.path OUT.

    Run the same command again to resume after an interruption. Every shard may be prepared on another machine.
    """
    from hfgpt.recipe import load_recipe

    loaded = load_recipe(recipe, _overrides(context), check_paths=True)
    from hfgpt.commands.prepare import prepare as prepare_data
    from hfgpt.commands.prepare import render_manifest

    manifest = prepare_data(loaded, out, shard)
    if as_json:
        print(json.dumps({"finished": manifest is not None, **(manifest.to_dict() if manifest else {})}))
    else:
        _print(render_manifest(manifest, recipe, context.args, out))


@app.command()
def generate(
    model: Model,
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help="The text to continue; '' generates a new document.")
    ],
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Maximum number of new tokens (default: 100, or what fits in the context).")
    ] = None,
    temperature: Temperature = 0.8,
    top_k: TopK = 50,
    top_p: TopP = 1.0,
    greedy: Greedy = False,
    num_samples: Annotated[int, typer.Option(help="Number of texts to generate.")] = 1,
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="Random seed; the same seed gives the same text.")
    ] = 0,
    fast: Fast = False,
):
    """Generate text from a prompt."""
    from transformers import AutoModelForCausalLM

    from hfgpt.evaluation.fast_generation import speed_up_generation
    from hfgpt.evaluation.generation import SamplingArguments, TerminalStreamer, generate_texts
    from hfgpt.models import find_model

    arguments = SamplingArguments(max_new_tokens, temperature, top_k, top_p, greedy, num_samples, seed)
    network, tokenizer = find_model(model).load_with_tokenizer(AutoModelForCausalLM, changed_weights="warn")
    if fast:
        speed_up_generation(network, half=True)
    streamer = TerminalStreamer(tokenizer, skip_special_tokens=True) if num_samples == 1 else None
    texts = generate_texts(network, tokenizer, prompt, arguments, streamer)
    if streamer is None:
        _print("\n\n".join(texts))


@app.command()
def chat(
    model: Model,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Maximum number of tokens in an answer (default: a quarter of the context).")
    ] = None,
    temperature: Temperature = 0.8,
    top_k: TopK = 50,
    top_p: TopP = 1.0,
    greedy: Greedy = False,
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="Random seed; the same seed gives the same answers.")
    ] = 0,
    web: Annotated[bool, typer.Option("--web", help="Chat in a browser instead; prints the URL of the page.")] = False,
    fast: Fast = False,
):
    """Chat with an instruction-tuned model; commands: /reset, /system TEXT, /exit."""
    from hfgpt.commands.chat import run_chat
    from hfgpt.evaluation.generation import SamplingArguments

    sampling = SamplingArguments(max_new_tokens, temperature, top_k, top_p, greedy, 1, seed)
    if web:
        from hfgpt.commands.serve import serve as serve_model

        serve_model(model, "127.0.0.1", 0, sampling, system, fast)
    else:
        run_chat(model, sampling, system, fast=fast)


@app.command()
def classify(
    model: Model,
    texts: Annotated[
        list[str] | None,
        typer.Argument(metavar="TEXT", help="Texts to classify (default: the lines of standard input)."),
    ] = None,
    file: Annotated[
        Path | None, typer.Option(help="Also classify each line of this file; - reads standard input.")
    ] = None,
    as_json: AsJson = False,
):
    """Classify texts and print the probability of each class."""
    from hfgpt.commands.classify import classify as classify_texts

    predictions = classify_texts(model, texts or [], file)
    if as_json:
        rows = [{"text": found.text, "label": found.label, "score": found.score} for found in predictions]
        # On a terminal, all but ASCII is escaped: json does not escape C1 controls and bidirectional marks.
        print(json.dumps({"predictions": rows}, ensure_ascii=sys.stdout.isatty()))
    else:
        for found in predictions:
            likeliest = sorted(found.probabilities.items(), key=lambda item: -item[1])
            _print(f"{found.label}\t{', '.join(f'{label} {value:.4f}' for label, value in likeliest)}\t{found.text}")


@app.command(context_settings=TAKES_OVERRIDES)
def evaluate(
    context: typer.Context,
    model: Model,
    task: Annotated[
        str | None,
        typer.Option(
            help="pretrain (next token), classify or instruct (default: pretrain, or classify for a classifier)."
        ),
    ] = None,
    benchmarks: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...", help="Benchmarks of lm-evaluation-harness, or YAML files or folders of its tasks."
        ),
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="With --benchmarks: requests per batch (default: 8).")] = None,
    limit: Annotated[int | None, typer.Option(help="With --benchmarks: only the first rows of each.")] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="With --benchmarks: examples in each prompt (default: as the benchmark says).")
    ] = None,
    chat_template: Annotated[
        bool | None,
        typer.Option("--chat-template", help="With --benchmarks: format prompts with the model's chat template."),
    ] = None,
    as_json: AsJson = False,
):
    """Evaluate a model on all rows of a dataset: loss and perplexity, accuracy, or exact match; or on benchmarks.

    Examples: hfgpt evaluate runs/demo --data.path my_text.txt; hfgpt evaluate runs/demo --benchmarks arc_easy,piqa
    """
    given = {"batch_size": batch_size, "limit": limit, "num_fewshot": num_fewshot, "chat_template": chat_template}
    given = {name: value for name, value in given.items() if value is not None}
    if benchmarks is not None:
        _evaluate_benchmarks(model, benchmarks, given, [*(["--task"] if task else []), *_overrides(context)], as_json)
        return
    if given:
        raise InputError(f"--{next(iter(given)).replace('_', '-')} only applies to --benchmarks: leave it out")
    from hfgpt.recipe import SECTIONS, parse_sections

    if task not in (None, *SECTIONS):
        raise InputError(f"--task is '{task}'; it must be pretrain, classify or instruct")
    saved, overrides = None, _overrides(context)
    if task is None:
        from hfgpt.models import find_model

        saved = find_model(model)
        task = "classify" if saved.is_classifier else "pretrain"
    sections = parse_sections(overrides, task, ["data", "evaluation"])
    from hfgpt.models import find_model
    from hfgpt.runs.evaluation import refuse_unused
    from hfgpt.tasks import TASKS

    refuse_unused(task, overrides, sections["data"])
    metrics = TASKS[task].evaluate(saved or find_model(model), **sections)
    if as_json:
        print(json.dumps(metrics))
    else:
        for name, value in metrics.items():
            _print(f"{name:24} {value:,.4f}" if isinstance(value, float) else f"{name:24} {value:,}")


def _evaluate_benchmarks(model: str, names: str, given: dict, unused: list[str], as_json: bool):
    if unused:
        raise InputError(f"{unused[0]} does not apply to --benchmarks, which have their own data: leave it out")
    from hfgpt.commands.evaluate import evaluate_benchmarks, render_benchmarks
    from hfgpt.evaluation import BenchmarkArguments

    arguments = BenchmarkArguments([name.strip() for name in names.split(",")], **given)
    results = evaluate_benchmarks(model, arguments)
    if as_json:
        print(json.dumps({"benchmarks": {name: result.to_dict() for name, result in results.items()}}))
    else:
        _print(render_benchmarks(results))


@app.command()
def verify(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder, also of an export, or a Hub model id.")],
    against: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="An OpenAI-compatible server that runs the model, such as http://127.0.0.1:8000/v1 (default: load "
            "the model here).",
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            help="float32, float16 or bfloat16, in which it must be computed (default: that of the saved weights, and "
            "float32 for a server)."
        ),
    ] = None,
):
    """Check that a copy of a model, or a server, computes the answers that were recorded with its weights.

    Example: hfgpt verify runs/demo
    """
    from hfgpt.commands.verify import verify

    _print(verify(model, against, precision))


@app.command()
def serve(
    model: Model,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 accepts other machines.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 chooses a free one.")] = 8000,
    web: Annotated[bool, typer.Option("--web", help="Also serve a page to use the model in a browser.")] = False,
    fast: Fast = False,
):
    """Serve a language model with an OpenAI-compatible API until Ctrl-C; prints the URL when it is ready.

    Example: hfgpt serve runs/demo
    """
    from hfgpt.commands.serve import serve as serve_model
    from hfgpt.evaluation.generation import SamplingArguments

    serve_model(model, host, port, SamplingArguments() if web else None, fast=fast)


@app.command()
def merge(
    adapter: Annotated[
        str,
        typer.Argument(
            metavar="ADAPTER", help="The folder of a run that trained an adapter, or a Hub id.", callback=_existing
        ),
    ],
    out: OutputFolder,
    tolerance: Annotated[
        float,
        typer.Option(help="Largest allowed difference of logits, relative to the largest logit if that is above 1."),
    ] = 1e-5,
):
    """Merge an adapter into its base model and verify that the logits stay the same."""
    from hfgpt.commands.merge import merge as merge_into_base

    merge_into_base(adapter, out, tolerance)


@app.command(name="import")
def import_weights(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A GPT-2 model (Hub id or folder, also OpenAI's TensorFlow files), or a checkpoint of nanoGPT or of "
            "Raschka's Build a Large Language Model (the book).",
        ),
    ],
    out: OutputFolder,
    checkpoint_format: Annotated[
        str, typer.Option("--format", help="auto, gpt2, nanogpt or book; auto detects the format.")
    ] = "auto",
    num_heads: Annotated[
        int | None, typer.Option(help="Number of attention heads, if not stored in the checkpoint.")
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="A Hub id, a folder, or nanoGPT's meta.pkl (default: the one next to the weights)."),
    ] = None,
    vocab_size: Annotated[
        int | None, typer.Option(help="Number of embedding rows to keep (default: one per token).")
    ] = None,
    lora_scale: Annotated[
        float | None, typer.Option(help="Scale of the book's LoRA layers: alpha, or alpha / rank in its later code.")
    ] = None,
    hidden_act: Annotated[
        str | None, typer.Option(help="Activation function, if it is not the format's default.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
):
    """Convert a GPT-2, nanoGPT or book checkpoint to a model for AutoModel, and verify its logits."""
    from hfgpt.commands.convert import import_checkpoint
    from hfgpt.conversion.sources import ImportArguments

    arguments = ImportArguments(checkpoint_format, num_heads, tokenizer, vocab_size, lora_scale, hidden_act, revision)
    import_checkpoint(source, out, arguments)


@app.command()
def export(
    model: Model,
    out: OutputFolder,
    export_format: Annotated[
        str, typer.Option("--format", help="gpt2 (transformers, no custom code), gguf (llama.cpp), ollama, or onnx.")
    ] = "gpt2",
    dtype: Annotated[
        str | None, typer.Option(help="Type of the matrices in a GGUF file: f32, f16 or q8_0 (default: f32).")
    ] = None,
    merge_adapter: Annotated[
        bool,
        typer.Option("--merge-adapter", help="Required if MODEL is an adapter: merge it into its base model first."),
    ] = False,
):
    """Export a model for programs that do not have hfgpt, and verify its logits."""
    from hfgpt.commands.export import ExportArguments
    from hfgpt.commands.export import export as export_to

    export_to(model, out, ExportArguments(export_format, dtype, merge_adapter))


@app.command(name="publish", context_settings=TAKES_OVERRIDES)
def publish_model(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The folder of a run or of a saved model.")],
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="user/name on the Hub.")],
    publish_format: Annotated[
        str, typer.Option("--format", help="hfgpt, or gpt2: standard transformers GPT-2, no custom code needed.")
    ] = "hfgpt",
    private: Annotated[bool, typer.Option("--private/--public", help="Visibility of a new repository.")] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Run all checks and show the files and the card, but upload nothing.")
    ] = False,
    revision: Annotated[
        str | None, typer.Option(help="Branch to upload to; created if it does not exist (default: main).")
    ] = None,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Open a pull request instead of committing to the branch.")
    ] = False,
    commit_message: Annotated[str | None, typer.Option(help="Commit message.")] = None,
    space: Annotated[bool, typer.Option("--space", help="Also make or update a Space that runs the model.")] = False,
    space_name: Annotated[
        str | None, typer.Option(help="user/name of the Space (default: REPO_ID); implies --space.")
    ] = None,
):
    """Check a model, write its model card and upload it to the Hub; set card fields with --hub.license mit etc."""
    from hfgpt.commands.publish import PublishArguments, publish

    made = space_name if space_name is not None else repo_id if space else None
    arguments = PublishArguments(publish_format, private, dry_run, revision, create_pr, commit_message, space=made)
    if code := publish(model, repo_id, arguments, _overrides(context)):
        _print(code)


@app.command()
def recipes(as_json: AsJson = False):
    """List the recipes that ship with hfgpt: their names, what they do and how to run them."""
    from hfgpt.commands.recipes import list_recipes, render_recipes
    from hfgpt.output import output_width

    found = list_recipes()
    if as_json:
        print(json.dumps({"recipes": [{**vars(recipe), "file": str(recipe.file)} for recipe in found]}))
    else:
        _print(render_recipes(found, output_width()))


@app.command()
def keys(
    section: Annotated[
        str | None,
        typer.Argument(metavar="SECTION", help="A section, or one key, as in data.path (default: all sections)."),
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="pretrain, classify or instruct (default: the keys of all three).")
    ] = None,
    as_json: AsJson = False,
):
    """List the keys of recipes, with the type, default and meaning of each."""
    from hfgpt.commands.keys import list_keys, render_keys
    from hfgpt.output import output_width

    found = list_keys(section, task)
    if as_json:
        print(json.dumps({"sections": [dataclasses.asdict(entry) for entry in found]}))
    else:
        _print(render_keys(found, output_width()))


@app.command()
def bench(
    part: Annotated[
        str | None,
        typer.Argument(metavar="PART", help="train, decode, data, load or memory (default: all)."),
    ] = None,
    nanogpt: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Also measure nanoGPT: a checkout of it, whose model.py is run."),
    ] = None,
    as_json: AsJson = False,
):
    """Compare speed and memory with transformers' GPT-2 on this machine: the same weights, in turns.

    Ratios are hfgpt's value relative to the other's. All parts take about an hour on two cores.
    """
    from hfgpt.bench import BenchArguments

    arguments = BenchArguments(part, nanogpt)
    from hfgpt.commands.bench import bench as measure
    from hfgpt.commands.bench import render_comparison, render_machine

    if not as_json:
        measure(arguments, lambda found: _print(render_machine(found)), lambda found: _print(render_comparison(found)))
        return
    machines, comparisons = [], []
    measure(arguments, machines.append, comparisons.append)
    print(json.dumps({"machine": machines[0].to_dict(), "comparisons": [found.to_dict() for found in comparisons]}))


@app.command(name="inspect", context_settings=TAKES_OVERRIDES)
def inspect_data(
    context: typer.Context,
    recipe: RecipeName,
    rows: Annotated[int, typer.Option(help="Number of training rows to show.")] = 3,
):
    """Show how a recipe's data is prepared: rows kept and dropped, blocks, and the tokens that have a loss."""
    from hfgpt.recipe import load_recipe

    loaded = load_recipe(recipe, _overrides(context), check_paths=True)
    from hfgpt.commands.inspect import inspect_recipe

    inspect_recipe(loaded, rows)


@app.command(context_settings=TAKES_OVERRIDES)
def plan(context: typer.Context, recipe: RecipeName, as_json: AsJson = False):
    """Estimate the cost of a recipe before running it: parameters, memory, FLOPs and time on this machine."""
    from hfgpt.recipe import load_recipe

    loaded = load_recipe(recipe, _overrides(context), check_paths=True)
    from hfgpt.commands.plan import plan_recipe, render_plan

    estimate = plan_recipe(loaded)
    if loaded.training.process_index == 0:
        _print(json.dumps(estimate.to_dict()) if as_json else render_plan(estimate))


@app.command()
def doctor(as_json: AsJson = False):
    """Print versions, device, precision, attention kernels and Hub login."""
    from hfgpt.commands.doctor import examine, render_examination

    findings = examine()
    _print(json.dumps(findings) if as_json else render_examination(findings))


@app.command()
def demo(
    output_dir: Annotated[
        Path | None, typer.Option(help="Folder for the demo's runs (default: a new folder in runs/).")
    ] = None,
):
    """Train a small model on generated stories and fine-tune it for two tasks, offline, in minutes."""
    from hfgpt.commands.demo import run_demo

    run_demo(output_dir)


for _command in app.registered_commands:
    # Otherwise the list of commands truncates it to one line.
    _command.short_help = _command.callback.__doc__.partition("\n\n")[0]


def main() -> NoReturn:
    """The console script."""
    try:
        _run()
    except SystemExit as end:
        distributed = sys.modules.get("torch.distributed")  # not imported by all commands
        if distributed and distributed.is_initialized():
            # A thread of gloo that releases its last tensors while Python shuts down would abort the process, and the
            # launcher would then stop the others. destroy_process_group() does not end these threads after training
            # with DistributedDataParallel (torch 2.13).
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(end.code)
        raise


def _run() -> NoReturn:
    """Runs the command of the command line, and exits with its status; errors of users are one line."""
    # Before transformers and huggingface_hub are imported: they read these once.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    for number in {*STOP_SIGNALS} - {signal.SIGINT}:
        signal.signal(number, signal.default_int_handler)  # stops, and cleans up, as Ctrl-C does
    try:
        "".join(sys.argv).encode()  # invalid UTF-8 arrives as lone surrogates, which tokenizers reject
        # click by default breaks the lines of help at 50 to 80 columns, whatever the width of the terminal.
        width = max(min(shutil.get_terminal_size().columns, 100), 30) - 2
        words = sys.argv[1:] or ["--help"]
        if app(words, prog_name="hfgpt", standalone_mode=False, terminal_width=width) == 130:
            raise KeyboardInterrupt  # typer turned it into a status
        sys.stdout.flush()
        sys.exit(0)
    except InputError as error:
        _refuse(str(error))
    except Interrupted as error:
        _stop(str(error))
    except (KeyboardInterrupt, typer.Abort):
        _stop("stopped")
    except BrokenPipeError:
        sys.stdout = io.StringIO()  # closed by its reader, as with `| head`; Python would flush it again and fail
        sys.exit(1)
    except OSError as error:
        if error.errno is None:
            raise
        if error.filename is None:
            sys.stdout = io.StringIO()  # this may be what cannot be written
        remedy = {
            errno.ENOSPC: "free some space, or choose a folder on another disk",
            errno.EACCES: "change its permissions, or choose another folder",
            errno.EROFS: "choose a folder on a writable disk",
        }.get(error.errno, "check the path")
        _refuse(f"{error.strerror}: {error.filename or 'while writing'}; {remedy}")
    except UnicodeEncodeError as error:
        letters = error.object[error.start : error.end]
        _refuse(f"{letters!r} cannot be written in {error.encoding}: use a terminal that is set to UTF-8")
    except UsageError as error:
        _refuse(_explain_usage(error))
    # A panic in a Rust library; the class cannot be imported.
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        _refuse(f"the tokenizer's files are damaged ({error}): save or copy them again")


def _print(text: str):
    """Prints a result: on a terminal with control characters made visible, elsewhere as it is."""
    print(make_visible(text) if sys.stdout.isatty() else text)


def _overrides(context: typer.Context) -> list[str]:
    """The overrides of recipe keys; a misspelled option of the command is reported as one."""
    options = [name for parameter in context.command.params for name in parameter.opts]
    for argument in context.args:
        nearest = difflib.get_close_matches(argument, options, n=1)
        if argument.startswith("--") and "." not in argument and nearest:
            raise InputError(f"there is no option '{argument}'; did you mean '{nearest[0]}'?")
    return context.args


def _explain_usage(error: UsageError) -> str:
    message = error.format_message().rstrip(".").replace("\n", " ")
    words = message.split("'")
    if "command" in message and len(words) > 1:
        names = [command.name or command.callback.__name__ for command in app.registered_commands]
        nearest = difflib.get_close_matches(words[1], names, n=1, cutoff=0.4)
        return f"there is no command '{words[1]}'; " + (
            f"did you mean '{nearest[0]}'?" if nearest else f"the commands are: {', '.join(names)}"
        )
    return f"{message}; see {error.ctx.command_path if error.ctx else 'hfgpt'} --help"


def _refuse(message: str) -> NoReturn:
    _report(" ".join(message.splitlines()))
    sys.exit(2)


def _stop(message: str) -> NoReturn:
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)  # if exiting takes long, a second signal ends it immediately
    _report(message)
    sys.exit(130)  # the status that shells report after Ctrl-C


def _report(message: str):
    """Prints a message to stderr, with the rank of this process if there are several."""
    process = f"process {os.environ.get('RANK')}: " if os.environ.get("WORLD_SIZE", "1") != "1" else ""
    print(f"hfgpt: {process}{make_visible(message)}", file=sys.stderr)
