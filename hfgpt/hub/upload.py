"""The way to the Hub: one commit with huggingface_hub's own client, then a look at what arrived.

The client sends each large file once: what a broken upload has brought over is found there by its hash. The commit
comes last and whole, so a repository never holds half of the files.
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
# What a repository may hold that nobody would miss: it is new.
EMPTY = (".gitattributes", "README.md", "LICENSE")
# Seconds before each further attempt; the client itself has by then repeated most requests for half a minute.
WAITS = (2, 10)
# What of an earlier publication would be read with a new one: weights, settings, records.
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
        revision: A branch, made if it is not there; None: main.
        create_pr: Whether to open a pull request instead of writing to the branch.
        message: Of the commit.
    """

    repo_id: str
    private: bool = True
    revision: str | None = None
    create_pr: bool = False
    message: str = "Publish with hfgpt"

    def __str__(self) -> str:
        return self.repo_id if self.revision is None else f"{self.repo_id} (branch {self.revision})"


def upload(folder: Path, names: list[str], target: Target) -> CommitInfo:
    """Sends files in one commit, which also removes what an earlier publication left.

    Args:
        folder: Of the files.
        names: Theirs, relative to it.
        target: Where to.

    Returns:
        The commit; the existing one where nothing has changed.

    Raises:
        InputError: The Hub refused, cannot be reached, or holds something else under this name.
    """
    # A second pull request would not be the first one again.
    waits = () if target.create_pr else None
    return _persist(lambda: _commit(folder, names, target), target.repo_id, waits)


def verify(hashes: dict[str, str], target: Target, commit: CommitInfo):
    """Downloads a commit to a new cache and compares the hash of each file.

    Args:
        hashes: Name -> sha256 of the files that were sent.
        target: Where to.
        commit: Theirs.

    Raises:
        InputError: A file did not arrive as it was sent, or cannot be read back.
    """
    revision = commit.pr_revision or commit.oid
    with tempfile.TemporaryDirectory(prefix="hfgpt-verify-", ignore_cleanup_errors=True) as cache:
        names = [glob.escape(name) for name in hashes]
        options = {"revision": revision, "cache_dir": cache, "allow_patterns": names}
        try:
            arrived = Path(_persist(lambda: snapshot_download(target.repo_id, **options), target.repo_id))
        except InputError as error:
            raise InputError(f"it was sent, but not read back: {error}") from error
        for name, sent in hashes.items():
            if not (arrived / name).is_file() or hash_file(arrived / name) != sent:
                raise InputError(f"'{name}' did not arrive at {target} as it was sent: publish again")


def fetch_base(repo_id: str, revision: str | None = None) -> tuple[str, Path, list[str]]:
    """Fetches what a model on the Hub is loaded from, and runs nothing of it.

    Returns:
        The commit that the revision stands at, a folder, and the names of the files there: weights and settings.

    Raises:
        InputError: The Hub has no such model or cannot be reached, or the model would run Python that is not hfgpt's.
    """

    def fetch() -> tuple[str, Path, list[str]]:
        info = HfApi().model_info(repo_id, revision=revision)
        present = [file.rfilename for file in info.siblings or []]
        code = [name for name in present if name.endswith(".py")]
        wanted = [name for name in present if name in CODE or re.fullmatch(r"[^/\\]*\.json", name)]
        weights = [name for name in present if re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors", name)]
        wanted += weights or [name for name in present if re.fullmatch(r"pytorch_model(-\d+-of-\d+)?\.bin", name)]
        if "config.json" not in wanted:
            raise InputError(f"'{repo_id}' has no config.json, so it is not a model: name the base of the adapter")
        fetched = [Path(hf_hub_download(repo_id, name, revision=info.sha)) for name in wanted]
        folder = fetched[0].parent
        if fault := find_foreign_code(folder, [*code, *wanted]):
            raise InputError(
                f"readers of the card would run the code of '{repo_id}', where {fault}: publish that model again with "
                "this version of hfgpt, or merge the adapter into it with hfgpt merge and publish the merged model"
            )
        return info.sha, folder, wanted

    return _persist(fetch, repo_id)


def check_login(repo_id: str):
    """Asks the Hub who is logged in, so that a missing token is known before hours of training.

    Raises:
        InputError: The Hub says no. That it does not answer is no reason not to train.
    """
    try:
        HfApi().whoami()
    except (HTTPError, OSError) as error:
        causes = _causes(error)
        if any(isinstance(cause, LocalTokenNotFoundError) or _status(cause) in (401, 403) for cause in causes):
            raise InputError(explain(error, repo_id)) from error


def explain(error: BaseException, repo_id: str) -> str:
    """One line for what the client raised, with its remedy."""
    causes = _causes(error)
    status = next(filter(None, map(_status, causes)), None)
    if any(isinstance(cause, LocalTokenNotFoundError) for cause in causes) or status == 401:
        return f"the Hub does not know who asks for '{repo_id}': log in with `hf auth login`"
    if any(isinstance(cause, OfflineModeIsEnabled) for cause in causes):
        return f"'{repo_id}' cannot be reached: HF_HUB_OFFLINE is set, so unset it"
    if status == 403:
        return f"the Hub does not let you write to '{repo_id}': use a token that may write, or a name of your own"
    if status == 404:
        return f"the Hub has no '{repo_id}', or no such branch, for who is logged in: check the name and the login"
    if status in (409, 412):
        return f"'{repo_id}' is being changed by somebody else: publish again"
    if status and status < 500 and status not in (408, 429):
        return f"the Hub rejected '{repo_id}' ({_in_one_line(causes)}): fix this and publish again"
    last = next((cause for cause in causes if _is_local(cause)), causes[-1])
    fact = re.sub(r"\s+", " ", str(last))[:200] or type(last).__name__
    if _is_local(last):
        return f"a file of this machine cannot be read or written ({fact}): fix this and publish again"
    what = "the Hub fails" if status else "the Hub cannot be reached"
    return f"{what} ({fact}): publish again later; what has arrived is not sent again"


def _persist(attempt: Callable[[], T], repo_id: str, waits: Sequence[float] | None = None) -> T:
    """Does what asks the Hub, and again after each wait, by default `WAITS`, while what goes wrong may pass.

    The client itself repeats downloads, uploads and most of what comes before a commit, but neither the commit nor
    what creates or looks up a repository. Where the answer to a commit is lost, or another one came first, all is
    looked up anew: an unchanged file is not committed twice.

    Raises:
        InputError: It does not pass.
    """
    left = list(WAITS if waits is None else waits)
    while True:
        try:
            return attempt()
        except (HTTPError, OSError, RuntimeError) as error:  # all that the client and its HTTP library raise
            if not left or not _is_passing(error):
                raise InputError(explain(error, repo_id)) from error
            time.sleep(left.pop(0))


def _commit(folder: Path, names: list[str], target: Target) -> CommitInfo:
    api = HfApi()
    if "README.md" in names:
        _validate(folder / "README.md")
    head, present = _prepare(api, target)
    stale = sorted(name for name in present if OURS.fullmatch(name) and name not in names)
    operations = [CommitOperationAdd(name, folder / name) for name in names]
    # Not `upload_folder`: with hf_xet it commits in parts, and one that fails is split (huggingface_hub 2.4,
    # _upload_pipeline.py), so that a repository could hold half of the files. Its `delete_patterns` cannot say "not in
    # folders".
    return api.create_commit(
        target.repo_id,
        [*operations, *(CommitOperationDelete(name) for name in stale)],
        commit_message=target.message,
        revision=target.revision,
        create_pr=target.create_pr,
        parent_commit=head,  # refused if somebody else has written in the meantime
    )


def _validate(card: Path):
    """Has the Hub check the metadata of a card, before anything is made there.

    As `ModelCard.validate` does, which in older versions asks huggingface.co whatever Hub is set.

    Raises:
        InputError: It does not take them.
    """
    body = {"repoType": "model", "content": card.read_text(encoding="utf-8")}
    answer = get_session().post(f"{constants.ENDPOINT}/api/validate-yaml", json=body)
    if answer.status_code == 400:
        said = re.sub(r"\s+", " ", answer.text).strip()[:300]
        raise InputError(f"the Hub does not take the metadata of the card ({said}): correct the section hub")
    hf_raise_for_status(answer)


def _prepare(api: HfApi, target: Target) -> tuple[str, list[str]]:
    """Makes the repository and the branch if they are not there; returns the branch's head and its files.

    Raises:
        InputError: The repository is public and the publication is not, or the other way round; or it holds a model of
            another kind.
    """
    repo_id, revision = target.repo_id, target.revision
    try:
        private = api.repo_info(repo_id).private
    except RepositoryNotFoundError:
        api.create_repo(repo_id, private=target.private, exist_ok=True)
        private = target.private
    if bool(private) != target.private:
        raise InputError(
            f"'{repo_id}' exists and is public: pass --public to publish there, or name another"
            if target.private
            else f"'{repo_id}' exists and is private: leave out --public, or change it in its settings"
        )
    try:
        info = api.repo_info(repo_id, revision=revision)
    except RevisionNotFoundError:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
        info = api.repo_info(repo_id, revision=revision)
    present = [file.rfilename for file in info.siblings or []]
    foreign = [name for name in present if name not in EMPTY]
    if foreign and not _is_ours(repo_id, info.sha, present):
        raise InputError(
            f"'{repo_id}' holds {foreign[0]} and no card of hfgpt's, so something else would be written over: name "
            "another repository"
        )
    return info.sha, present


def _is_ours(repo_id: str, revision: str, present: Sequence[str]) -> bool:
    """Whether what a repository holds was published by hfgpt: its card says so, or its model is one of hfgpt's."""
    with tempfile.TemporaryDirectory(prefix="hfgpt-look-") as cache:
        read = {
            name: Path(hf_hub_download(repo_id, name, revision=revision, cache_dir=cache)).read_text(encoding="utf-8")
            for name in ("README.md", "config.json")
            if name in present
        }
    try:
        card, config = ModelCard(read.get("README.md", "")), json.loads(read.get("config.json", "{}"))
    except (ValueError, yaml.YAMLError):
        return False
    return "hfgpt" in (card.data.tags or []) or config.get("model_type") == "hfgpt"


def _in_one_line(causes: Sequence[BaseException]) -> str:
    """What the server says, or else the last error."""
    said = next((cause.server_message for cause in causes if isinstance(cause, HfHubHTTPError)), None)
    return re.sub(r"\s+", " ", said or str(causes[-1])).strip()[:200]


def _is_passing(error: BaseException) -> bool:
    """Whether trying again may help: the server failed, somebody else wrote, or the connection broke."""
    statuses = [status for status in map(_status, _causes(error)) if status]
    if statuses:
        return statuses[0] >= 500 or statuses[0] in (408, 409, 412, 429)
    lasting = (LocalTokenNotFoundError, OfflineModeIsEnabled)
    return not any(isinstance(cause, lasting) or _is_local(cause) for cause in _causes(error))


def _is_local(error: BaseException) -> bool:
    """Whether a file or the disk is at fault: an error of the system that is not of a connection."""
    network = (ConnectionError, TimeoutError, socket.gaierror)
    return isinstance(error, OSError) and error.errno is not None and not isinstance(error, network)


def _status(error: BaseException) -> int | None:
    """The HTTP status of an answer that is an error."""
    return error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None


def _causes(error: BaseException) -> list[BaseException]:
    """The error and what it was raised from, outermost first."""
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    return causes
