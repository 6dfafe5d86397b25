"""`hfgpt publish`: checks a saved model as its users will load it, and uploads it to the Hub."""

import dataclasses
import io
import json
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from huggingface_hub import CommitInfo, ModelCard, constants, get_token
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hfgpt.commands.convert import export_model
from hfgpt.errors import InputError
from hfgpt.hub import HubArguments, check_repo_id
from hfgpt.hub.card import describe_architecture
from hfgpt.hub.contents import Contents, find_secrets, sort_contents
from hfgpt.hub.folder import FolderRecords, explained_records, read_records
from hfgpt.hub.space import write_space
from hfgpt.hub.staging import files_in, stage, stage_base, stage_native
from hfgpt.hub.stranger import Expected, check_as_stranger, compute_expected, compute_native
from hfgpt.hub.upload import Target, fetch_base, prepare, upload, verify
from hfgpt.hub.usage import Place, loading_code
from hfgpt.models import find_model, hash_weights
from hfgpt.output import stderr_console
from hfgpt.recipe import parse_sections
from hfgpt.records import CARD_FILE, is_hub_id
from hfgpt.runs.remeasure import measure_again
from hfgpt.saving import hash_file
from hfgpt.tokenizer import tokenizer_hash

NATIVE_BRANCH = "gpt2"
Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase | None]


@dataclass
class PublishArguments:
    """The options of `hfgpt publish`.

    Args:
        format: `hfgpt`, or `gpt2` for a standard transformers GPT-2, which does not need custom code.
        private: Whether a new repository is private.
        dry_run: Whether to run all checks and upload nothing.
        revision: A branch; None: main.
        create_pr: Whether to open a pull request.
        commit_message: None: one that names the folder.
        measure: Whether to re-evaluate the weights; not needed right after a run.
        space: `user/name` of a Gradio Space that runs the model, to make or update; None: none.
    """

    format: str = "hfgpt"
    private: bool = True
    dry_run: bool = False
    revision: str | None = None
    create_pr: bool = False
    commit_message: str | None = None
    measure: bool = True
    space: str | None = None

    def __post_init__(self):
        if self.format not in ("hfgpt", "gpt2"):
            raise InputError(f"--format is '{self.format}'; it must be hfgpt or gpt2")
        if self.create_pr and self.revision is not None:
            raise InputError("--create-pr opens a pull request against main: leave out --revision")
        if self.space is not None:
            check_repo_id("--space-name", self.space)
            if self.create_pr:
                raise InputError("--space runs a published commit, which a pull request is not: leave out --create-pr")
        if self.revision is not None and not re.fullmatch(r"\w[\w./-]*", self.revision):
            raise InputError(
                f"--revision '{self.revision}' is not a valid branch name: use letters, digits and . - _ /"
            )


@dataclass
class Branch:
    """The files for one branch of the repository.

    Args:
        folder: The folder of exactly these files.
        place: Where users will load them from.
        hashes: Name -> SHA-256 of the checked files.
        kind: `model`, or `space` for the files of a Space.
    """

    folder: Path
    place: Place
    hashes: dict[str, str] = field(default_factory=dict)
    kind: str = "model"

    def hash_files(self) -> dict[str, str]:
        """Name -> SHA-256 of the files as they are now."""
        return {name: hash_file(self.folder / name) for name in files_in(self.folder)}

    def __str__(self) -> str:
        if self.kind == "space":
            return f"Space {self.place.name}"
        return f"branch {self.place.revision or 'main'}, format {'gpt2' if self.place.native else 'hfgpt'}"


def publish(
    model: str,
    repo_id: str,
    arguments: PublishArguments | None = None,
    overrides: Sequence[str] = (),
    console: Console | None = None,
) -> str:
    """Checks a saved model, uploads it to the Hub in one commit per branch, and verifies the upload.

    Args:
        model: The folder of a run, a checkpoint, an adapter, a merged or an imported model.
        repo_id: `user/name`.
        arguments: The options.
        overrides: Such as `--hub.license mit`; those of `data` and `evaluation` set what to evaluate on.
        console: Where to report; None: standard error.

    Returns:
        Python code that loads the published model; empty after a dry run.

    Raises:
        InputError: A check failed and nothing was uploaded, or the Hub rejected the upload or did not answer.
    """
    arguments, console = arguments or PublishArguments(), console or stderr_console()
    folder = Path(model)
    check_repo_id("REPO_ID", repo_id)

    def passed(what: str):
        console.print(f"  ok  {what}", highlight=False, markup=False)

    with tempfile.TemporaryDirectory(prefix="hfgpt-publish-") as temporary:
        # 1. to 4. Check the folder; the model is loaded here, once for all checks.
        records, hub, contents, (model, tokenizer) = check_folder(folder, arguments, overrides, passed)
        branches = plan_branches(Path(temporary), repo_id, arguments, hub)
        space = plan_space(Path(temporary), records, arguments)

        # 5. Evaluate these weights for the card.
        if arguments.measure:
            passed(measure_again(model, records, overrides, console))
        expected = compute_expected(model, tokenizer, records)
        del model  # frees its memory for the exported one
        base = Path(temporary) / "base" if records.adapter and arguments.format == "hfgpt" else None
        if base:
            hub = pin_base(records, hub, base)
            passed(f"its base model is on the Hub: {hub.base_model} at commit {hub.base_revision}")

        # 6. and 7. Make the files and the card of each branch, and load them without hfgpt.
        for branch in branches:
            make_branch(branch, contents.going, records, hub, passed, expected, base)
            show_files(branch, console)
        show_missing(contents, records, hub, console)
        if arguments.dry_run:
            if space:
                make_space(space, branches[0].place, hub, arguments, console)
            show_card(branches[0], console)
            return ""

        # 8. Upload and verify.
        send_all(branches, space, f"Publish {folder.resolve().name}", hub, arguments, passed, console)
        return describe_loading(branches)


def check_folder(
    folder: Path, arguments: PublishArguments, overrides: Sequence[str], passed: Callable[[str], None]
) -> tuple[FolderRecords, HubArguments, Contents, Loaded]:
    """Checks the contents of a folder and reports each check that has passed.

    Returns:
        Its records, the section `hub`, which files to publish, and the model with its tokenizer.

    Raises:
        InputError: A check failed.
    """
    # 1. An hfgpt model, whose base model is available to others.
    records = open_folder(folder)
    hub = read_hub_arguments(records, overrides)
    if records.adapter and arguments.format == "hfgpt":
        check_base(records.adapter["base_model_name_or_path"], hub)
    passed(f"'{folder}' is an hfgpt {'adapter' if records.adapter else 'model'}")

    # 2. The weights that were evaluated.
    records, loaded = check_weights(folder, records)
    passed("its weights load and are finite" + (", and are the evaluated ones" if records.metrics else ""))

    # 3. Only known file types.
    contents = sort_contents(folder)
    passed(f"{len(contents.going)} files to publish are safetensors, JSON, text or PNG")

    # 4. No secrets.
    refuse_secrets(folder, contents.going)
    passed("no file contains a token, key or password")
    return records, hub, contents, loaded


def open_folder(folder: Path) -> FolderRecords:
    """Reads the records of a folder with an hfgpt model or adapter.

    Raises:
        InputError: It is not a folder, or does not have one.
    """
    if not folder.is_dir():
        raise InputError(f"'{folder}' is not a folder: pass the folder of a run, or of a merged or imported model")
    model = find_model(str(folder))
    kind = model.config.model_type  # of the base, for an adapter
    if kind != "hfgpt" and not (model.adapter and kind == "gpt2"):
        remedy = (
            "publish the model it was exported from with --format gpt2" if kind == "gpt2" else "pass an hfgpt model"
        )
        raise InputError(f"'{folder}' contains a model of type {kind}, not hfgpt: {remedy}")
    return read_records(folder)


def read_hub_arguments(records: FolderRecords, overrides: Sequence[str]) -> HubArguments:
    """The section `hub` of the run's recipe with the overrides of the command line."""
    for option, remedy in {
        "repo_id": "pass REPO_ID",
        "private": "pass --private or --public",
        "strategy": "leave it out",
    }.items():
        if any(override.partition("=")[0] == f"--hub.{option}" for override in overrides):
            raise InputError(f"--hub.{option} only applies to hfgpt train: {remedy}")
    given = records.recipe.get("hub") or {}
    with explained_records(records.folder):
        written = [
            f"--hub.{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in given.items()
        ]
    task = records.task or "pretrain"
    return parse_sections([*written, *overrides], task, ["data", "evaluation", "hub"])["hub"]


def check_base(base: str, hub: HubArguments):
    """Rejects an adapter whose base model is only a local folder, unless `hub` names it on the Hub."""
    if hub.base_model is None and not is_hub_id(base):
        raise InputError(
            f"the adapter's base model '{base}' is a local folder, which its users do not have: publish it and pass "
            "--hub.base_model user/name, or merge the adapter with hfgpt merge"
        )


def plan_branches(temporary: Path, repo_id: str, arguments: PublishArguments, hub: HubArguments) -> list[Branch]:
    """The branches to publish; their files are not made yet.

    Raises:
        InputError: The options do not allow a second branch.
    """
    native = arguments.format == "gpt2"
    branches = [Branch(temporary / "main", Place(repo_id, arguments.revision, native))]
    if hub.native_branch and not native:
        if arguments.create_pr or arguments.revision is not None:
            option = "--create-pr" if arguments.create_pr else f"--revision {arguments.revision}"
            raise InputError(
                f"hub.native_branch publishes to main and to the branch {NATIVE_BRANCH}: leave out {option}, or pass "
                "--hub.native_branch false"
            )
        branches.append(Branch(temporary / NATIVE_BRANCH, Place(repo_id, NATIVE_BRANCH, native=True)))
    return branches


def plan_space(temporary: Path, records: FolderRecords, arguments: PublishArguments) -> Branch | None:
    """The Space to publish, whose files are not made yet; None: there is none.

    Raises:
        InputError: The model cannot run there.
    """
    if arguments.space is None:
        return None
    if records.adapter and arguments.format == "hfgpt":
        raise InputError("--space needs a model, not an adapter: pass --format gpt2, or merge it with hfgpt merge")
    if not records.has_tokenizer:
        raise InputError(f"--space needs a tokenizer, and '{records.folder}' has none: leave out --space")
    return Branch(temporary / "space", Place(arguments.space), kind="space")


def make_space(space: Branch, model: Place, hub: HubArguments, arguments: PublishArguments, console: Console):
    """Makes and shows the files of a Space that runs a model, and checks that they contain no secret."""
    write_space(space.folder, model, hub.license, arguments.private)
    space.hashes = space.hash_files()
    refuse_secrets(space.folder, list(space.hashes))
    show_files(space, console)


def pin_base(records: FolderRecords, hub: HubArguments, staging: Path) -> HubArguments:
    """Sets the base model of an adapter in the section `hub`, at its current commit.

    Args:
        records: The adapter's records.
        hub: Names the base model on the Hub, if the adapter names a local folder.
        staging: The folder to make with the base model at that commit.

    Raises:
        InputError: The base model is not on the Hub, has different weights, or has code that is not hfgpt's.
    """
    base, revision = hub.base_model, hub.base_revision
    if base is None:
        base, revision = records.adapter["base_model_name_or_path"], revision or records.adapter.get("revision")
    commit, folder, names = fetch_base(base, revision)
    expected = records.run.base_weights_sha256
    if expected and find_model(str(folder)).hash() != expected:
        raise InputError(
            f"the weights of '{base}' are not those the adapter was trained on: publish the right base model"
        )
    stage_base(folder, staging, names)
    return dataclasses.replace(hub, base_model=base, base_revision=commit)


def make_branch(
    branch: Branch,
    names: Sequence[str],
    records: FolderRecords,
    hub: HubArguments,
    passed: Callable[[str], None],
    expected: Expected,
    base: Path | None = None,
):
    """Makes the files of a branch and checks them.

    Args:
        branch: Its `hashes` are set.
        names: The files in the folder to publish.
        records: The records of the folder.
        hub: Details for the card.
        passed: Called with a description of each check that has passed.
        expected: What the model in the folder computes.
        base: The base model of an adapter, see `pin_base`.

    Raises:
        InputError: The model cannot be exported to GPT-2, the card is invalid or contains a secret, or a process
            without hfgpt computes different results.
    """
    native, folder = branch.place.native, records.folder
    if native:
        quiet = Console(file=io.StringIO())
        export_model(str(folder), branch.folder, merge_adapter=bool(records.adapter), console=quiet)
    with explained_records(folder):
        (stage_native if native else stage)(folder, branch.folder, names, records, hub, branch.place)
    branch.hashes = branch.hash_files()
    if hash_weights(folder) != records.run.weights_sha256:
        raise InputError(f"the weights in '{folder}' changed during the checks: publish again")
    # The weights were searched before; all other files may have been added or changed since.
    refuse_secrets(branch.folder, [name for name in branch.hashes if not name.endswith(".safetensors")])
    check_metadata(branch.folder / CARD_FILE)
    passed(f"the metadata of the card is valid ({branch})")
    expected = compute_native(branch.folder, expected) if native else expected
    check_as_stranger(branch.folder, expected, native, None if native else base)
    passed(f"a fresh process without hfgpt loads the files and computes the same logits ({branch})")


def refuse_secrets(folder: Path, names: Sequence[str]):
    """Rejects files that contain what looks like a token, a key or a password."""
    if secrets := find_secrets(folder, names):
        raise InputError(f"{'; '.join(secrets)}; remove it, and revoke it if it was ever published")


def check_weights(folder: Path, records: FolderRecords) -> tuple[FolderRecords, Loaded]:
    """Loads the model and compares weights and tokenizer with the hashes recorded when it was evaluated.

    Returns:
        The records with `run.architecture`, and the model with its tokenizer.

    Raises:
        InputError: The weights are incomplete, not finite or not the evaluated ones, or the tokenizer has changed.
    """
    saved = find_model(str(folder))
    model = saved.load()
    run = dataclasses.replace(records.run, weights_sha256=hash_weights(folder))
    for name, benchmark in records.benchmarks.items():
        if benchmark.weights_sha256 != run.weights_sha256:
            raise InputError(
                f"the benchmark '{name}' in metrics.json was measured on other weights: run it again, or remove "
                "the entry benchmarks"
            )
    tokenizer = saved.load_tokenizer() if records.has_tokenizer or run.tokenizer_sha256 else None
    if run.tokenizer_sha256 and tokenizer_hash(tokenizer) != run.tokenizer_sha256:
        raise InputError(f"the tokenizer in '{folder}' is not the one used in the run: restore the original")
    run.architecture = describe_architecture(model)
    return dataclasses.replace(records, run=run), (model, tokenizer)


def check_metadata(path: Path):
    """Parses the card's metadata as the Hub does.

    Raises:
        InputError: It is missing or invalid.
    """
    content = path.read_text(encoding="utf-8")
    try:
        card = ModelCard(content)
        valid = REGEX_YAML_BLOCK.search(content) and card.data.to_dict()
    except (ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise InputError(f"the metadata of the card is invalid ({error}): correct the section hub") from error
    if not valid:
        raise InputError("the card has no metadata: correct the section hub")


def send(branch: Branch, arguments: PublishArguments, message: str, passed: Callable[[str], None]) -> CommitInfo:
    """Uploads a branch in one commit and verifies it; for a pull request, `branch.place` becomes its branch."""
    target = _target(branch, arguments, message)
    if branch.hash_files() != branch.hashes:
        raise InputError("files changed after they were checked: publish again")
    commit = upload(branch.folder, list(branch.hashes), target)
    verify(branch.hashes, target, commit)
    passed(f"uploaded and verified {len(branch.hashes)} files: {commit.pr_url or commit.commit_url}")
    branch.place = dataclasses.replace(branch.place, revision=commit.pr_revision or branch.place.revision)
    return commit


def _target(branch: Branch, arguments: PublishArguments, message: str) -> Target:
    place, message = branch.place, arguments.commit_message or message
    return Target(place.name, arguments.private, place.revision, arguments.create_pr, message, branch.kind)


def send_all(
    branches: Sequence[Branch],
    space: Branch | None,
    message: str,
    hub: HubArguments,
    arguments: PublishArguments,
    passed: Callable[[str], None],
    console: Console,
):
    """Uploads and verifies the branches, then the Space, which runs the first of them; prints their URLs."""
    if space:  # refused before the model is uploaded
        prepare(_target(space, arguments, message))
    commits = [send(branch, arguments, message, passed) for branch in branches]
    if space:
        published = dataclasses.replace(branches[0].place, revision=commits[0].oid)
        make_space(space, published, hub, arguments, console)
        send(space, arguments, f"Run {published.name}", passed)
    visibility = "private" if arguments.private else "public"
    for repository in (branches[0].place.name, *([f"spaces/{space.place.name}"] if space else [])):
        console.print(f"published: {constants.ENDPOINT}/{repository} ({visibility})", highlight=False, soft_wrap=True)


def describe_loading(branches: Sequence[Branch]) -> str:
    """Python code that loads each branch."""
    return "\n\n".join(loading_code(read_records(branch.folder), branch.place) for branch in branches)


def show_missing(contents: Contents, records: FolderRecords, hub: HubArguments, console: Console):
    """Prints which files are not published and why, and what the card is missing."""
    lines = [f"  {'not published':>15}  {name}: {reason}" for name, reason in contents.staying.items()]
    if hub.license is None:
        lines.append(
            "the card has no license, and without one nobody may use the model: set one, such as --hub.license mit"
        )
    if not records.metrics:
        lines.append("the card has no evaluation results: set --data.path to evaluate the model")
    for line in lines:
        console.print(line, highlight=False, markup=False)


def show_card(branch: Branch, console: Console):
    """Prints the card of a dry run."""
    card = (branch.folder / CARD_FILE).read_text(encoding="utf-8")
    login = "a Hub token is set" if get_token() else "not logged in: run `hf auth login` before publishing"
    console.print(f"the card:\n\n{card}\nnothing was uploaded (--dry-run); {login}", highlight=False, markup=False)


def show_files(branch: Branch, console: Console):
    """Prints the files of a branch and their sizes."""
    sizes = {name: (branch.folder / name).stat().st_size for name in branch.hashes}
    console.print(f"{len(sizes)} files, {sum(sizes.values()):,} bytes ({branch}):", highlight=False)
    for name, size in sizes.items():
        console.print(f"  {size:>15,}  {name}", highlight=False, markup=False)
