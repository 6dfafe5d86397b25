"""`hfgpt publish`: a saved model becomes a repository that strangers load, or nothing leaves this machine."""

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
from hfgpt.hub.staging import files_in, stage, stage_base, stage_native
from hfgpt.hub.stranger import Expected, check_as_stranger, compute_expected, compute_native
from hfgpt.hub.upload import Target, fetch_base, upload, verify
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
        if self.revision is not None and not re.fullmatch(r"\w[\w./-]*", self.revision):
            raise InputError(
                f"--revision '{self.revision}' is not a valid branch name: use letters, digits and . - _ /"
            )


@dataclass
class Branch:
    """What one branch of the repository gets.

    Args:
        folder: With the exact files.
        place: Where they go.
        hashes: The files that were checked: name -> sha256.
    """

    folder: Path
    place: Place
    hashes: dict[str, str] = field(default_factory=dict)

    def hash_files(self) -> dict[str, str]:
        """The hash of each file as it is now."""
        return {name: hash_file(self.folder / name) for name in files_in(self.folder)}

    def __str__(self) -> str:
        return f"branch {self.place.revision or 'main'}, format {'gpt2' if self.place.native else 'hfgpt'}"


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
        Python that loads the model from there; empty after a dry run.

    Raises:
        InputError: A check has failed, and nothing was sent; or the Hub has refused or not answered.
    """
    arguments, console = arguments or PublishArguments(), console or stderr_console()
    folder = Path(model)
    check_repo_id("REPO_ID", repo_id)

    def passed(what: str):
        console.print(f"  ok  {what}", highlight=False, markup=False)

    with tempfile.TemporaryDirectory(prefix="hfgpt-publish-") as temporary:
        # 1. to 4. What lies in the folder; its model is loaded here, once for all checks.
        records, hub, contents, (model, tokenizer) = check_folder(folder, arguments, overrides, passed)
        branches = plan_branches(Path(temporary), repo_id, arguments, hub)

        # 5. What the card will say: measured now, on these very weights.
        if arguments.measure:
            passed(measure_again(model, records, overrides, console))
        expected = compute_expected(model, tokenizer, records)
        del model  # a large one leaves room for those that follow
        base = Path(temporary) / "base" if records.adapter and arguments.format == "hfgpt" else None
        if base:
            hub = pin_base(records, hub, base)
            passed(f"its base model will be loaded from {hub.base_model} at commit {hub.base_revision}")

        # 6. and 7. The files as they will be, with their card, and as strangers will load them.
        for branch in branches:
            make_branch(branch, contents.going, records, hub, passed, expected, base)
            show_files(branch, console)
        show_missing(contents, records, hub, console)
        if arguments.dry_run:
            show_card(branches[0], console)
            return ""

        # 8. Send, and look at what arrived.
        for branch in branches:
            commit = send(branch, arguments, f"Publish {folder.resolve().name}")
            passed(f"{len(branch.hashes)} files arrived as they were sent: {commit.pr_url or commit.commit_url}")
        place = f"{constants.ENDPOINT}/{repo_id} ({'private' if arguments.private else 'public'})"
        console.print(f"published: {place}", highlight=False, soft_wrap=True)
        return describe_loading(branches)


def check_folder(
    folder: Path, arguments: PublishArguments, overrides: Sequence[str], passed: Callable[[str], None]
) -> tuple[FolderRecords, HubArguments, Contents, Loaded]:
    """The checks of what lies in a folder, in order, each told when it has passed.

    Returns:
        What the folder says of itself, the section `hub`, which files go, and the model with its tokenizer.

    Raises:
        InputError: The first check that fails says what is wrong.
    """
    # 1. A folder of ours, whose base model others can have.
    records = open_folder(folder)
    hub = read_hub_arguments(records, overrides)
    if records.adapter and arguments.format == "hfgpt":
        check_base(records.adapter["base_model_name_or_path"], hub)
    passed(f"'{folder}' is {'an adapter' if records.adapter else 'a model'} of hfgpt's")

    # 2. The weights that were measured.
    records, loaded = check_weights(folder, records)
    passed("its weights load and are finite" + (", and are those that were measured" if records.metrics else ""))

    # 3. Files of known kinds only.
    contents = sort_contents(folder)
    passed(f"it holds safetensors, JSON, text and PNG: {len(contents.going)} files to publish")

    # 4. Nothing secret in them.
    refuse_secrets(folder, contents.going)
    passed("no token, key or password is in them")
    return records, hub, contents, loaded


def open_folder(folder: Path) -> FolderRecords:
    """What lies in a folder of ours.

    Raises:
        InputError: It is no folder, or holds no model or adapter of hfgpt's.
    """
    if not folder.is_dir():
        raise InputError(f"'{folder}' is not a folder: name the folder of a run, or of a merged or imported model")
    model = find_model(str(folder))
    kind = model.config.model_type  # of the base, for an adapter
    if kind != "hfgpt" and not (model.adapter and kind == "gpt2"):
        remedy = "publish the model it was exported from with --format gpt2" if kind == "gpt2" else ""
        raise InputError(f"'{folder}' holds a model of type {kind}, not hfgpt: {remedy or 'name one of hfgpt'}")
    return read_records(folder)


def read_hub_arguments(records: FolderRecords, overrides: Sequence[str]) -> HubArguments:
    """The section `hub` of the run's recipe, with what the command line changes."""
    for option, instead in {
        "repo_id": "REPO_ID",
        "private": "--private or --public",
        "strategy": "hfgpt train",
    }.items():
        if any(override.partition("=")[0] == f"--hub.{option}" for override in overrides):
            raise InputError(f"--hub.{option} is of a recipe: here it is {instead} that says so")
    given = records.recipe.get("hub") or {}
    with explained_records(records.folder):
        written = [
            f"--hub.{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in given.items()
        ]
    task = records.task or "pretrain"
    return parse_sections([*written, *overrides], task, ["data", "evaluation", "hub"])["hub"]


def check_base(base: str, hub: HubArguments):
    """Refuses an adapter whose base model lies on this machine alone, unless `hub` names it as others know it."""
    if hub.base_model is None and not is_hub_id(base):
        raise InputError(
            f"the base model of the adapter is '{base}' on this machine, which nobody else has: publish it too and "
            "name it with --hub.base_model user/name, or merge them with hfgpt merge"
        )


def plan_branches(temporary: Path, repo_id: str, arguments: PublishArguments, hub: HubArguments) -> list[Branch]:
    """The branches to write, none of them made yet.

    Raises:
        InputError: Two of them are one.
    """
    native = arguments.format == "gpt2"
    branches = [Branch(temporary / "main", Place(repo_id, arguments.revision, native))]
    if hub.native_branch and not native:
        if arguments.create_pr or arguments.revision is not None:
            option = "--create-pr" if arguments.create_pr else f"--revision {arguments.revision}"
            raise InputError(
                f"hub.native_branch writes beside main to the branch {NATIVE_BRANCH}: leave out {option}, or pass "
                "--hub.native_branch false"
            )
        branches.append(Branch(temporary / NATIVE_BRANCH, Place(repo_id, NATIVE_BRANCH, native=True)))
    return branches


def pin_base(records: FolderRecords, hub: HubArguments, staging: Path) -> HubArguments:
    """The section `hub` with the base model of an adapter and the commit that others will load it from.

    Args:
        records: Of the adapter.
        hub: Names the base model, if the adapter names a folder.
        staging: The folder to make, with the base model as it is at that commit.

    Raises:
        InputError: The base model is not there, has other weights than the adapter was trained on, or foreign code.
    """
    base, revision = hub.base_model, hub.base_revision
    if base is None:
        base, revision = records.adapter["base_model_name_or_path"], revision or records.adapter.get("revision")
    commit, folder, names = fetch_base(base, revision)
    expected = records.run.base_weights_sha256
    if expected and find_model(str(folder)).hash() != expected:
        raise InputError(f"'{base}' has other weights than the adapter was trained on: publish the right base model")
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
    """Makes the files that a branch gets, and checks what was not in the folder before.

    Args:
        branch: Gets the hashes of its files.
        names: Of the files in the folder that go.
        records: Of the folder.
        hub: For the card.
        passed: Told of each check.
        expected: What the model in the folder computes.
        base: The base model of an adapter, see `pin_base`.

    Raises:
        InputError: GPT-2 cannot express the model, the card is not valid or holds a token, or a process without hfgpt
            computes something else.
    """
    native, folder = branch.place.native, records.folder
    if native:
        quiet = Console(file=io.StringIO())
        export_model(str(folder), branch.folder, merge_adapter=bool(records.adapter), console=quiet)
    with explained_records(folder):
        (stage_native if native else stage)(folder, branch.folder, names, records, hub, branch.place)
    branch.hashes = branch.hash_files()
    if hash_weights(folder) != records.run.weights_sha256:
        raise InputError(f"the weights in '{folder}' were changed while they were checked: publish again")
    # The weights themselves were looked through before; all else may have come or changed since.
    refuse_secrets(branch.folder, [name for name in branch.hashes if not name.endswith(".safetensors")])
    check_metadata(branch.folder / CARD_FILE)
    passed(f"the metadata of the card is valid ({branch})")
    expected = compute_native(branch.folder, expected) if native else expected
    check_as_stranger(branch.folder, expected, native, None if native else base)
    passed(f"a fresh process without hfgpt loads the files and computes the same ({branch})")


def refuse_secrets(folder: Path, names: Sequence[str]):
    """Refuses files that hold what looks like a token, a key or a password."""
    if secrets := find_secrets(folder, names):
        raise InputError(f"{'; '.join(secrets)}: remove it, and have it revoked if it was ever published")


def check_weights(folder: Path, records: FolderRecords) -> tuple[FolderRecords, Loaded]:
    """Loads the model, whole and finite, and compares its weights with the hash that was written when it was measured.

    Returns:
        The records, with an `architecture` in `run`; and the model with its tokenizer.

    Raises:
        InputError: They are damaged, or others than those that were measured.
    """
    saved = find_model(str(folder))
    model = saved.load()
    run = dataclasses.replace(records.run, weights_sha256=hash_weights(folder))
    tokenizer = saved.load_tokenizer() if records.has_tokenizer or run.tokenizer_sha256 else None
    if run.tokenizer_sha256 and tokenizer_hash(tokenizer) != run.tokenizer_sha256:
        raise InputError(f"the tokenizer in '{folder}' is not the one of the run: put that back")
    run.architecture = describe_architecture(model)
    return dataclasses.replace(records, run=run), (model, tokenizer)


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


def send(branch: Branch, arguments: PublishArguments, message: str) -> CommitInfo:
    """Uploads a branch in one commit and compares what arrived with what was sent; its place may be a pull request."""
    place, message = branch.place, arguments.commit_message or message
    target = Target(place.name, arguments.private, place.revision, arguments.create_pr, message)
    if branch.hash_files() != branch.hashes:
        raise InputError("files of the model were changed after they were checked: publish again")
    commit = upload(branch.folder, list(branch.hashes), target)
    verify(branch.hashes, target, commit)
    branch.place = dataclasses.replace(place, revision=commit.pr_revision or place.revision)
    return commit


def describe_loading(branches: Sequence[Branch]) -> str:
    """The lines that load each branch."""
    return "\n\n".join(loading_code(read_records(branch.folder), branch.place) for branch in branches)


def show_missing(contents: Contents, records: FolderRecords, hub: HubArguments, console: Console):
    """Prints what of the folder is not sent, and why; and what the card does not say, and how it would."""
    lines = [f"  {'stays here':>15}  {name}: {reason}" for name, reason in contents.staying.items()]
    if hub.license is None:
        lines.append(
            "the card has no license, without which nobody may use the model: set one, such as --hub.license mit"
        )
    if not records.metrics:
        lines.append("the card has no evaluation: name data to measure on with --data.path")
    for line in lines:
        console.print(line, highlight=False, markup=False)


def show_card(branch: Branch, console: Console):
    """Prints the card that a dry run would have sent."""
    card = (branch.folder / CARD_FILE).read_text(encoding="utf-8")
    login = "a Hub token is set" if get_token() else "not logged in: run `hf auth login` before publishing"
    console.print(f"the card:\n\n{card}\nnothing was sent (--dry-run); {login}", highlight=False, markup=False)


def show_files(branch: Branch, console: Console):
    """Prints what a branch gets, and how large it is."""
    sizes = {name: (branch.folder / name).stat().st_size for name in branch.hashes}
    console.print(f"{len(sizes)} files, {sum(sizes.values()):,} bytes ({branch}):", highlight=False)
    for name, size in sizes.items():
        console.print(f"  {size:>15,}  {name}", highlight=False, markup=False)
