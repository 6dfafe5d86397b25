"""Uploads files to the Hub in one commit with huggingface_hub's client, and verifies them there.

The client uploads each large file once: after an interruption, the Hub knows by their hashes which files it has. The
commit comes last and is atomic, so a repository never has only some of the files.
"""

import glob
import json
import re
import socket
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import yaml
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    constants,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session, hf_raise_for_status

from hfgpt.errors import InputError
from hfgpt.foreign_code import CODE, find_foreign_code
from hfgpt.saving import hash_file

T = TypeVar("T")
WEIGHTS_FILE = "model.safetensors"
# Files of a new repository, which may be overwritten.
EMPTY = (".gitattributes", "README.md", "LICENSE")
# Seconds before each retry, after the client's own retries of most requests, which take half a minute.
WAITS = (2, 10)
# Files that hfgpt publishes; old ones that are not part of a new upload are deleted.
OURS = re.compile(
    r"[^/]*\.safetensors(\.index\.json)?|pytorch_model[^/]*|(adapter_)?config\.json|generation_config\.json|"
    r"[^/]*_hfgpt\.py|tokenizer[^/]*|vocab\.json|merges\.txt|special_tokens_map\.json|added_tokens\.json|chat_template\.jinja|labels\.json|"
    r"(run|metrics|data_report|conversion|merge)\.json|recipe\.yaml|training_log\.jsonl|(loss|confusion)\.png|"
    r"\.eval_results/.*\.yaml"
)


@dataclass
class Target:
    """Where to publish.

    Args:
        repo_id: `user/name`.
        private: Whether a new repository is private.
        revision: A branch, created if it does not exist; None: main.
        create_pr: Whether to open a pull request instead of committing to the branch.
        message: Commit message.
        kind: `model` or `space`.
    """

    repo_id: str
    private: bool = True
    revision: str | None = None
    create_pr: bool = False
    message: str = "Publish with hfgpt"
    kind: str = "model"

    def __str__(self) -> str:
        return self.repo_id if self.revision is None else f"{self.repo_id} (branch {self.revision})"


def prepare(target: Target):
    """Creates the repository and the branch if they do not exist.

    Raises:
        InputError: The repository exists with a different visibility or has other files, or the Hub cannot be reached.
    """
    _persist(lambda: _prepare(HfApi(), target), target.repo_id)


def upload(folder: Path, names: list[str], target: Target) -> CommitInfo:
    """Uploads files in one commit, which also deletes stale files of earlier uploads.

    Args:
        folder: The folder of the files.
        names: Their names, relative to the folder.
        target: Where to publish.

    Returns:
        The commit; the latest one if nothing has changed.

    Raises:
        InputError: The Hub rejects the upload or cannot be reached, or the repository has another model.
    """
    # A retry would open a second pull request.
    waits = () if target.create_pr else None
    return _persist(lambda: _commit(folder, names, target), target.repo_id, waits)


def verify(hashes: dict[str, str], target: Target, commit: CommitInfo):
    """Downloads a commit to a new cache and compares the hash of each file.

    Args:
        hashes: Name -> SHA-256 of the uploaded files.
        target: Where they were uploaded.
        commit: Their commit.

    Raises:
        InputError: A file differs, or cannot be downloaded.
    """
    revision = commit.pr_revision or commit.oid
    with tempfile.TemporaryDirectory(prefix="hfgpt-verify-", ignore_cleanup_errors=True) as cache:
        names = [glob.escape(name) for name in hashes]
        options = {"revision": revision, "cache_dir": cache, "allow_patterns": names, "repo_type": target.kind}
        try:
            arrived = Path(_persist(lambda: snapshot_download(target.repo_id, **options), target.repo_id))
        except InputError as error:
            raise InputError(f"the files were uploaded, but not verified: {error}") from error
        for name, sent in hashes.items():
            if not (arrived / name).is_file() or hash_file(arrived / name) != sent:
                raise InputError(f"'{name}' in {target} differs from the uploaded file: publish again")


def fetch_base(repo_id: str, revision: str | None = None) -> tuple[str, Path, list[str]]:
    """Downloads a model from the Hub without running its code.

    Returns:
        The commit of the revision, the folder of the files, and their names: weights and configuration.

    Raises:
        InputError: There is no such model, the Hub cannot be reached, or the model needs code that is not hfgpt's.
    """

    def fetch() -> tuple[str, Path, list[str]]:
        info = HfApi().model_info(repo_id, revision=revision)
        present = [file.rfilename for file in info.siblings or []]
        code = [name for name in present if name.endswith(".py")]
        wanted = [name for name in present if name in CODE or re.fullmatch(r"[^/\\]*\.json", name)]
        weights = [name for name in present if re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors", name)]
        wanted += weights or [name for name in present if re.fullmatch(r"pytorch_model(-\d+-of-\d+)?\.bin", name)]
        if "config.json" not in wanted:
            raise InputError(f"'{repo_id}' is not a model (it has no config.json): give the adapter's base model")
        fetched = [Path(hf_hub_download(repo_id, name, revision=info.sha)) for name in wanted]
        folder = fetched[0].parent
        if fault := find_foreign_code(folder, [*code, *wanted]):
            raise InputError(
                f"users of the adapter would run the code of its base model '{repo_id}', where {fault}: publish the "
                "base model again with this version of hfgpt, or publish the merged model (hfgpt merge)"
            )
        return info.sha, folder, wanted

    return _persist(fetch, repo_id)


def check_login(repo_id: str):
    """Checks the login before hours of training; a Hub that does not answer is not an error.

    Raises:
        InputError: There is no token, or the Hub rejects it.
    """
    try:
        HfApi().whoami()
    except (HTTPError, OSError) as error:
        causes = _causes(error)
        if any(isinstance(cause, LocalTokenNotFoundError) or _status(cause) in (401, 403) for cause in causes):
            raise InputError(explain(error, repo_id)) from error


def explain(error: BaseException, repo_id: str) -> str:
    """Explains an error of the client in one line, with a remedy."""
    causes = _causes(error)
    status = next(filter(None, map(_status, causes)), None)
    if any(isinstance(cause, LocalTokenNotFoundError) for cause in causes) or status == 401:
        return f"'{repo_id}' needs a valid Hub token: log in with `hf auth login`"
    if any(isinstance(cause, OfflineModeIsEnabled) for cause in causes):
        return f"cannot reach '{repo_id}', since HF_HUB_OFFLINE is set: unset it"
    if status == 403:
        return f"no permission to write to '{repo_id}': use a token with write access, or your own repository"
    if status == 404:
        return f"'{repo_id}' or its branch does not exist, or you have no access to it: check the name and the login"
    if status in (409, 412):
        return f"'{repo_id}' was changed during the upload: publish again"
    if status and status < 500 and status not in (408, 429):
        return f"the Hub rejected '{repo_id}' ({_in_one_line(causes)}): fix this and publish again"
    last = next((cause for cause in causes if _is_local(cause)), causes[-1])
    fact = re.sub(r"\s+", " ", str(last))[:200] or type(last).__name__
    if _is_local(last):
        return f"cannot read or write a local file ({fact}): fix this and publish again"
    what = "the Hub returned an error" if status else "cannot reach the Hub"
    return f"{what} ({fact}): publish again later; files already uploaded are not sent again"


def _persist(attempt: Callable[[], T], repo_id: str, waits: Sequence[float] | None = None) -> T:
    """Calls the Hub, and retries temporary errors after each wait, by default `WAITS`.

    The client retries the transfer of files, but neither the commit nor the requests that look up or create a
    repository. After a lost response or a conflicting commit, a retry starts from the repository as it then is, and
    does not commit unchanged files.

    Raises:
        InputError: The error is permanent, or the retries are used up.
    """
    left = list(WAITS if waits is None else waits)
    while True:
        try:
            return attempt()
        except (HTTPError, OSError, RuntimeError) as error:  # all errors of the client and its HTTP library
            if not left or not _is_passing(error):
                raise InputError(explain(error, repo_id)) from error
            time.sleep(left.pop(0))


def _commit(folder: Path, names: list[str], target: Target) -> CommitInfo:
    api = HfApi()
    if "README.md" in names:
        _validate(folder / "README.md", target.kind)
    head, present = _prepare(api, target)
    is_model = target.kind == "model"
    stale = sorted(name for name in present if is_model and OURS.fullmatch(name) and name not in names)
    operations = [CommitOperationAdd(name, folder / name) for name in names]
    # Not `upload_folder`: with hf_xet it commits in batches and splits a batch whose commit fails (_upload_pipeline.py
    # of huggingface_hub 2.4), so the repository may be left with some of the files; and a `*` in its `delete_patterns`
    # also matches subfolders.
    return api.create_commit(
        target.repo_id,
        repo_type=target.kind,
        operations=[*operations, *(CommitOperationDelete(name) for name in stale)],
        commit_message=target.message,
        revision=target.revision,
        create_pr=target.create_pr,
        parent_commit=head,  # rejected if there is a newer commit
    )


def _validate(card: Path, kind: str):
    """Lets the Hub check a card's metadata, before a repository is created.

    `ModelCard.validate` does so, too, but in huggingface_hub 1.5 it ignores HF_ENDPOINT.

    Raises:
        InputError: The Hub rejects the metadata.
    """
    body = {"repoType": kind, "content": card.read_text(encoding="utf-8")}
    answer = get_session().post(f"{constants.ENDPOINT}/api/validate-yaml", json=body)
    if answer.status_code == 400:
        said = re.sub(r"\s+", " ", answer.text).strip()[:300]
        raise InputError(f"the Hub rejected the metadata of the card ({said}): correct the section hub")
    hf_raise_for_status(answer)


def _prepare(api: HfApi, target: Target) -> tuple[str, list[str]]:
    """Creates the repository and the branch if they do not exist; returns the branch's head and its files.

    Raises:
        InputError: The repository exists with a different visibility, or has a model that is not hfgpt's.
    """
    repo_id, revision, kind = target.repo_id, target.revision, target.kind
    try:
        private = api.repo_info(repo_id, repo_type=kind).private
    except RepositoryNotFoundError:
        sdk = "gradio" if kind == "space" else None
        api.create_repo(repo_id, private=target.private, exist_ok=True, repo_type=kind, space_sdk=sdk)
        private = target.private
    if bool(private) != target.private:
        raise InputError(
            f"'{repo_id}' exists and is public: pass --public, or choose another repository"
            if target.private
            else f"'{repo_id}' exists and is private: leave out --public, or change its visibility on the Hub"
        )
    try:
        info = api.repo_info(repo_id, revision=revision, repo_type=kind)
    except RevisionNotFoundError:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
        info = api.repo_info(repo_id, revision=revision, repo_type=kind)
    present = [file.rfilename for file in info.siblings or []]
    foreign = [name for name in present if name not in EMPTY]
    if foreign and not _is_ours(target, info.sha, present):
        ours = "an hfgpt model" if kind == "model" else "a Space of hfgpt"
        raise InputError(
            f"'{repo_id}' contains {foreign[0]} but not {ours}, and would be overwritten: choose another repository"
        )
    return info.sha, present


def _is_ours(target: Target, revision: str, present: Sequence[str]) -> bool:
    """Whether hfgpt published the files of a repository, by the card's tags or the model's type."""
    with tempfile.TemporaryDirectory(prefix="hfgpt-look-") as cache:
        read = {
            name: Path(
                hf_hub_download(target.repo_id, name, revision=revision, cache_dir=cache, repo_type=target.kind)
            ).read_text(encoding="utf-8")
            for name in ("README.md", "config.json")
            if name in present
        }
    try:
        card, config = ModelCard(read.get("README.md", "")), json.loads(read.get("config.json", "{}"))
    except (ValueError, yaml.YAMLError):
        return False
    return "hfgpt" in (card.data.tags or []) or config.get("model_type") == "hfgpt"


def _in_one_line(causes: Sequence[BaseException]) -> str:
    """The server's message, or else the last error."""
    said = next((cause.server_message for cause in causes if isinstance(cause, HfHubHTTPError)), None)
    return re.sub(r"\s+", " ", said or str(causes[-1])).strip()[:200]


def _is_passing(error: BaseException) -> bool:
    """Whether a retry may help: a server error, a conflicting commit or a broken connection."""
    statuses = [status for status in map(_status, _causes(error)) if status]
    if statuses:
        return statuses[0] >= 500 or statuses[0] in (408, 409, 412, 429)
    lasting = (LocalTokenNotFoundError, OfflineModeIsEnabled)
    return not any(isinstance(cause, lasting) or _is_local(cause) for cause in _causes(error))


def _is_local(error: BaseException) -> bool:
    """Whether the error is of a local file or disk, rather than of a connection."""
    network = (ConnectionError, TimeoutError, socket.gaierror)
    return isinstance(error, OSError) and error.errno is not None and not isinstance(error, network)


def _status(error: BaseException) -> int | None:
    """The HTTP status of an error response."""
    return error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None


def _causes(error: BaseException) -> list[BaseException]:
    """The error and its causes, outermost first."""
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    return causes
