"""`hfgpt publish`: a saved model becomes a repository that strangers load, or nothing leaves this machine."""

import dataclasses
import io
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from huggingface_hub import CommitInfo, ModelCard, constants, hf_hub_download
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from hfgpt import configuration_hfgpt, modeling_hfgpt
from hfgpt.adapters import base_of
from hfgpt.errors import InputError
from hfgpt.hub import HubArguments, check_repo_id
from hfgpt.hub.card import PICTURES, build_card, describe_architecture, evaluation_results
from hfgpt.hub.contents import Contents, find_secrets, sort_contents
from hfgpt.hub.records import Records, is_hub_id, read_records, without_paths
from hfgpt.hub.stranger import check_as_stranger
from hfgpt.hub.upload import Target, explain, upload, verify
from hfgpt.hub.usage import loading_code
from hfgpt.loading import hash_file, load_model, load_model_config
from hfgpt.recipe import parse_sections
from hfgpt.tasks.convert import export_model
from hfgpt.tasks.run_folder import describe_environment
from hfgpt.training.callbacks import stderr_console

# Entries of data_report.json that are texts of the data.
ROWS_OF_DATA = ("near_duplicate_examples",)
RESULTS_FILE = ".eval_results/hfgpt.yaml"
NATIVE_BRANCH = "gpt2"


@dataclass
class PublishArguments:
    """The options of `hfgpt publish`.

    Args:
        format: `hfgpt`, or `gpt2` for GPT-2's own layout, which needs no code of ours.
        private: Whether a new repository is private.
        dry_run: Whether to check and show everything, and send nothing.
        revision: A branch; None: main.
        create_pr: Whether to open a pull request.
        commit_message: None: one that names the folder.
        measure: Whether to measure the weights again; a run that has just ended need not.
    """

    format: str = "hfgpt"
    private: bool = True
    dry_run: bool = False
    revision: str | None = None
    create_pr: bool = False
    commit_message: str | None = None
    measure: bool = True

    def __post_init__(self):
        if self.format not in ("hfgpt", "gpt2"):
            raise InputError(f"--format is '{self.format}'; it must be hfgpt or gpt2")
        if self.create_pr and self.revision is not None:
            raise InputError("--create-pr opens a pull request against main: leave out --revision")


@dataclass
class Branch:
    """What one branch of the repository gets.

    Args:
        folder: With the exact files.
        revision: The branch; None: main.
        native: Whether they are a native GPT-2.
    """

    folder: Path
    revision: str | None
    native: bool

    @property
    def names(self) -> list[str]:
        """Of all files below the folder, relative to it."""
        files = (path for path in self.folder.rglob("*") if path.is_file())
        return sorted(path.relative_to(self.folder).as_posix() for path in files)

    def __str__(self) -> str:
        return f"{self.revision or 'main'}: {'gpt2' if self.native else 'hfgpt'}"


def publish(
    model: str,
    repo_id: str,
    arguments: PublishArguments | None = None,
    overrides: Sequence[str] = (),
    console: Console | None = None,
) -> str:
    """Checks a saved model, sends it to the Hub in one commit, and looks at what arrived.

    Args:
        model: The folder of a run, a checkpoint, an adapter, a merged or an imported model.
        repo_id: `user/name`.
        arguments: The options.
        overrides: `--hub.license mit` and the like, and of the sections `data` and `evaluation` what to measure on.
        console: Where to report; None: standard error.

    Returns:
        Python that loads the model from there.

    Raises:
        InputError: A check has failed, and nothing was sent; or the Hub has refused or not answered.
    """
    arguments, console = arguments or PublishArguments(), console or stderr_console()
    folder = Path(model)
    check_repo_id("REPO_ID", repo_id)

    def passed(what: str):
        console.print(f"  ok  {what}", highlight=False, markup=False)

    records, hub, contents = check_folder(folder, overrides, passed)
    if arguments.measure:
        from hfgpt.tasks.remeasure import measure_again  # of the tasks, whose runs end here

        records.metrics, told = measure_again(folder, records, overrides, console)
        passed(told)
    with tempfile.TemporaryDirectory(prefix="hfgpt-publish-") as temporary:
        # 5. and 6. The files as they will be, with their card, and as strangers will load them.
        branches = [Branch(Path(temporary) / "main", arguments.revision, arguments.format == "gpt2")]
        if hub.native_branch and not branches[0].native:
            branches.append(Branch(Path(temporary) / NATIVE_BRANCH, NATIVE_BRANCH, native=True))
        for branch in branches:
            stage(folder, branch, records, hub, repo_id)
            check_metadata(branch.folder / "README.md")
            passed(f"the metadata of the card is valid ({branch})")
            check_as_stranger(branch.folder, read_records(branch.folder), branch.native)
            passed(f"a fresh process without hfgpt loads the files and computes the same ({branch})")
            show_files(branch, console)
        show_staying(contents, console)
        code = loading_code(read_records(branches[0].folder), repo_id, branches[0].native)
        if arguments.dry_run:
            show_card(branches[0], console)
            return code

        # 7. Send, and look at what arrived.
        for branch in branches:
            commit = send(branch, repo_id, arguments, f"Publish {folder.resolve().name}")
            passed(f"{len(branch.names)} files arrived as they were sent: {commit.pr_url or commit.commit_url}")
    console.print(f"published: {constants.ENDPOINT}/{repo_id}", highlight=False, soft_wrap=True)
    return code


def check_folder(
    folder: Path, overrides: Sequence[str], passed: Callable[[str], None]
) -> tuple[Records, HubArguments, Contents]:
    """The checks of what lies in a folder, in order, each told when it has passed.

    Returns:
        What the folder says of itself, the section `hub`, and which files go.

    Raises:
        InputError: The first check that fails says what is wrong.
    """
    # 1. A folder of ours.
    records = open_folder(folder)
    hub = read_hub_arguments(records, overrides)
    check_base(records, hub)
    passed(f"'{folder}' is {'an adapter' if records.adapter else 'a model'} of hfgpt's")

    # 2. The weights that were measured.
    records = check_weights(folder, records)
    passed("its weights load and are finite" + (", and are those that were measured" if records.metrics else ""))

    # 3. Files of known kinds only.
    contents = sort_contents(folder)
    passed(f"it holds safetensors, JSON, text and PNG: {len(contents.going)} files to publish")

    # 4. Nothing secret in them.
    if secrets := find_secrets(folder, contents.going):
        raise InputError(f"{'; '.join(secrets)}: remove it, and have it revoked if it was ever published")
    passed("no token, key or password is in them")
    return records, hub, contents


def open_folder(folder: Path) -> Records:
    """What lies in a folder of ours.

    Raises:
        InputError: It is no folder, or holds no model or adapter of hfgpt's.
    """
    if not folder.is_dir():
        raise InputError(f"'{folder}' is no folder: name that of a run, or of a merged or imported model")
    config = load_model_config(str(folder))  # of the base, for an adapter
    adapter = (folder / "adapter_config.json").is_file()
    if config.model_type != "hfgpt" and not (adapter and config.model_type == "gpt2"):
        remedy = "publish the model it was exported from with --format gpt2" if config.model_type == "gpt2" else ""
        raise InputError(
            f"'{folder}' holds a model of type {config.model_type}, not hfgpt: {remedy or 'name one of hfgpt'}"
        )
    auto_map = getattr(config, "auto_map", None)
    if not adapter and auto_map not in (None, configuration_hfgpt.AUTO_MAP):
        raise InputError(f"the config.json of '{folder}' names code of others (auto_map): save the model again")
    return read_records(folder)


def read_hub_arguments(records: Records, overrides: Sequence[str]) -> HubArguments:
    """The section `hub` of the run's recipe, with what the command line changes."""
    given = records.recipe.get("hub", {})
    written = [f"--hub.{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in given.items()]
    task = records.task or "pretrain"
    return parse_sections([*written, *overrides], task, ["data", "evaluation", "hub"])["hub"]


def check_base(records: Records, hub: HubArguments):
    """Refuses an adapter whose base model strangers cannot have.

    Raises:
        InputError: It lies on this machine alone, or the published one has other weights.
    """
    if not records.adapter:
        return
    base = records.adapter["base_model_name_or_path"]
    if hub.base_model is None and not is_hub_id(base):
        raise InputError(
            f"the base model of the adapter is '{base}' on this machine, which nobody else has: publish it too and "
            "name it with --hub.base_model user/name, or merge them with hfgpt merge"
        )
    expected = records.run.get("base_weights_sha256")
    if hub.base_model is not None and expected:
        try:
            weights = hf_hub_download(hub.base_model, "model.safetensors")
        except OSError as error:
            raise InputError(explain(error, hub.base_model)) from error
        if hash_file(Path(weights)) != expected:
            raise InputError(
                f"'{hub.base_model}' has other weights than the adapter was trained on: publish the right base model"
            )


def check_weights(folder: Path, records: Records) -> Records:
    """Loads the model, whole and finite, and compares its weights with the hash that was written when it was measured.

    Returns:
        The records, with an `architecture` in `run`.

    Raises:
        InputError: They are damaged, or others than those that were measured.
    """
    file = folder / ("adapter_model.safetensors" if records.adapter else "model.safetensors")
    network = base_of(load_model(str(folder), auto_class=_auto_class(records)))
    run = dict(records.run)
    if file.is_file():
        actual = hash_file(file)
        if run.get("weights_sha256") not in (None, actual):
            raise InputError(
                f"the weights in '{file}' were changed after they were measured: their sha256 is {actual[:12]}..., "
                f"that in run.json {run['weights_sha256'][:12]}...: put the measured ones back, or train again"
            )
        run["weights_sha256"] = actual
    if "architecture" not in run:
        parameters = sum(value.numel() for name, value in network.named_parameters() if "lora_" not in name)
        run["architecture"] = describe_architecture(network.config, parameters)
    return dataclasses.replace(records, run={**describe_environment(), **run})


def stage(folder: Path, branch: Branch, records: Records, hub: HubArguments, repo_id: str):
    """Makes the folder that is sent: links to what goes as it is, and written anew what names places of this machine.

    Args:
        folder: Of the model.
        branch: Its folder is made.
        records: Of the model, with the metrics to publish.
        hub: For the card.
        repo_id: For the card.
    """
    staging = branch.folder
    if branch.native:
        quiet = Console(file=io.StringIO())
        export_model(str(folder), staging, merge_adapter=bool(records.adapter), console=quiet)
    else:
        staging.mkdir()
        _link_files(folder, staging, sort_contents(folder).going)
        _write_code(staging, records, hub)
    _link_files(folder, staging, [name for name in PICTURES if (folder / name).is_file()])
    kept = {"run.json": records.run, "metrics.json": records.metrics, "merge.json": records.merge}
    # Its near duplicates are shown by their texts, which are rows of the data.
    kept["data_report.json"] = {key: value for key, value in records.data.items() if key not in ROWS_OF_DATA}
    kept["conversion.json"] = read_records(staging).conversion
    for name, content in kept.items():
        if content:
            _replace(staging / name, json.dumps(without_paths(content), indent=2, ensure_ascii=False) + "\n")
    if records.recipe:
        said = {key: value for key, value in vars(hub).items() if value is not None}
        recipe = {**without_paths(records.recipe), "hub": said}
        _replace(staging / "recipe.yaml", yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True))
    final = dataclasses.replace(read_records(staging), recipe=without_paths(records.recipe))
    _replace(staging / "README.md", str(build_card(final, hub, repo_id, branch.native).render()).rstrip() + "\n")
    if results := evaluation_results(final):
        (staging / RESULTS_FILE).parent.mkdir()
        _replace(staging / RESULTS_FILE, yaml.safe_dump(results, sort_keys=False, allow_unicode=True))


def _link_files(folder: Path, staging: Path, names: Sequence[str]):
    for name in names:
        if not (staging / name).exists():
            (staging / name).symlink_to((folder / name).resolve())


def _write_code(staging: Path, records: Records, hub: HubArguments):
    """The two Python files as they are installed here, whatever lay in the folder; or an adapter's public base."""
    if records.adapter:
        if hub.base_model is not None:
            adapter = {**records.adapter, "base_model_name_or_path": hub.base_model}
            _replace(staging / "adapter_config.json", json.dumps(adapter, indent=2) + "\n")
        return
    for module in (configuration_hfgpt, modeling_hfgpt):
        path = Path(module.__file__)
        _replace(staging / path.name, path.read_text(encoding="utf-8"))


def check_metadata(path: Path):
    """Reads the card's metadata back as the Hub does.

    Raises:
        InputError: huggingface_hub does not take it.
    """
    content = path.read_text(encoding="utf-8")
    try:
        card = ModelCard(content)
        valid = REGEX_YAML_BLOCK.search(content) and card.data.to_dict()
    except (ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise InputError(f"the metadata of the card is not valid ({error}): correct the section hub") from error
    if not valid:
        raise InputError("the card has no metadata: correct the section hub")


def send(branch: Branch, repo_id: str, arguments: PublishArguments, message: str) -> CommitInfo:
    """Uploads a branch in one commit and compares what arrived with what was sent."""
    create_pr = arguments.create_pr and branch.revision is None
    target = Target(repo_id, arguments.private, branch.revision, create_pr, arguments.commit_message or message)
    commit = upload(branch.folder, branch.names, target)
    verify(branch.folder, branch.names, target, commit)
    return commit


def show_staying(contents: Contents, console: Console):
    """Prints what of the folder is not sent, and why."""
    for name, reason in contents.staying.items():
        console.print(f"  {'stays here':>15}  {name}: {reason}", highlight=False, markup=False)


def show_card(branch: Branch, console: Console):
    """Prints the card that a dry run would have sent."""
    card = (branch.folder / "README.md").read_text(encoding="utf-8")
    console.print(f"the card:\n\n{card}\nnothing was sent (--dry-run)", highlight=False, markup=False)


def show_files(branch: Branch, console: Console):
    """Prints what a branch gets, and how large it is."""
    sizes = {name: (branch.folder / name).stat().st_size for name in branch.names}
    console.print(f"{len(sizes)} files, {sum(sizes.values()):,} bytes ({branch}):", highlight=False)
    for name, size in sizes.items():
        console.print(f"  {size:>15,}  {name}", highlight=False, markup=False)


def _replace(path: Path, text: str):
    """Writes a file anew: through a link it would be the run's own that changes."""
    path.unlink(missing_ok=True)
    path.write_text(text, encoding="utf-8")


def _auto_class(records: Records):
    return AutoModelForSequenceClassification if records.task == "classify" else AutoModelForCausalLM
