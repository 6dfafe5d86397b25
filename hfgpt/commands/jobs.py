"""`hfgpt train RECIPE --on FLAVOR`: trains a recipe on Hugging Face Jobs.

A folder with hfgpt and the recipe is uploaded and mounted in the job, read-only, at `/job`. The run folder is in a
private bucket, mounted at `/runs`, so that a job that dies loses nothing after its last checkpoint: the next attempt,
or a new job with the same command, resumes the run.
"""

import difflib
import hashlib
import importlib.metadata
import inspect
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from huggingface_hub import HfApi, JobHardware, Volume, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled
from packaging.requirements import Requirement

import hfgpt
from hfgpt.data.cache import cache_folder
from hfgpt.data.files import find_source, has_tokens, is_url
from hfgpt.durations import parse_duration
from hfgpt.errors import InputError
from hfgpt.recipe import Recipe, find_recipe, recipe_folder
from hfgpt.records import RECIPE_FILE
from hfgpt.saving import appearing_folder, quote_path

IMAGE = "ghcr.io/astral-sh/uv:python3.12-bookworm"
BUCKET = "hfgpt-runs"
ATTEMPTS = 3  # of a job that fails, such as on a machine with a fault; each resumes the run
LOGIN = "HF Jobs need a valid Hub token: log in with `hf auth login`, or pass --namespace to see the commands only"
REPORTERS = {"tensorboard", "trackio", "wandb"}  # packages of the same name
LOCAL_HOSTS = ("localhost", "127.0.0.1", "0.0.0.0", "::1")


@dataclass
class JobArguments:
    """The options of `hfgpt train` for HF Jobs.

    Args:
        flavor: Hardware, as listed by `hf jobs hardware`.
        submit: Whether to submit the job; otherwise it is only shown.
        timeout: When to stop the job: a number and a unit (s, m, h or d).
        namespace: User or organization that runs and pays for the job; None: the user who is logged in.
    """

    flavor: str
    submit: bool = False
    timeout: str = "4h"
    namespace: str | None = None

    def __post_init__(self):
        flavors = [flavor.value for flavor in JobHardware]
        if self.flavor not in flavors:
            near = difflib.get_close_matches(self.flavor, flavors, n=1, cutoff=0.4)
            remedy = f"did you mean '{near[0]}'?" if near else f"the flavors are: {', '.join(flavors)}"
            raise InputError(f"'{self.flavor}' is not a flavor of HF Jobs; {remedy}")
        parse_duration(self.timeout, "--timeout")
        if "attempts" not in inspect.signature(HfApi.run_job).parameters:
            raise InputError("--on needs huggingface_hub 2.4 or newer: run pip install --upgrade huggingface_hub")

    @property
    def gpus(self) -> int:
        """Number of GPUs of the flavor, or 1 for a CPU."""
        several = re.search(r"x(\d+)$", self.flavor)
        return int(several[1]) if several else 1


@dataclass
class Job:
    """A job that can be submitted.

    Args:
        name: Name of the run folder in the bucket, and of the job.
        namespace: User or organization.
        folder: The folder to upload.
        script: The command line to run.
        secrets: Names of environment variables whose values the job gets, as secrets.
        arguments: The options.
    """

    name: str
    namespace: str
    folder: Path
    script: str
    secrets: list[str]
    arguments: JobArguments

    @property
    def bucket(self) -> str:
        return f"{self.namespace}/{BUCKET}"

    def render(self) -> str:
        """The two commands of `hf` that submit the job; they contain the names of secrets only."""
        arguments = self.arguments
        words = ["hf", "jobs", "run", "--detach", "--name", self.name, "--namespace", self.namespace]
        words += ["--flavor", arguments.flavor, "--timeout", arguments.timeout, "--attempts", str(ATTEMPTS)]
        words += [word for secret in self.secrets for word in ("--secrets", secret)]
        words += ["--env", "PYTHONPATH=/job", "--volume", f"{self.folder}:/job"]
        words += ["--volume", f"hf://buckets/{self.bucket}:/runs", IMAGE, "--", "bash", "-c", self.script]
        return f"hf buckets create {self.bucket} --private --exist-ok\n{shlex.join(words)}"

    def submit(self, api: HfApi) -> str:
        """Creates the bucket, uploads the folder and starts the job; returns the job's URL."""
        values = {name: get_token() if name == "HF_TOKEN" else os.environ[name] for name in self.secrets}
        api.create_bucket(self.bucket, private=True, exist_ok=True)
        code = api.sync_job_volume(self.folder, "/job", namespace=self.namespace)
        return api.run_job(
            image=IMAGE,
            command=["bash", "-c", self.script],
            env={"PYTHONPATH": "/job"},
            secrets=values,
            flavor=self.arguments.flavor,
            timeout=self.arguments.timeout,
            attempts=ATTEMPTS,
            name=self.name,
            volumes=[code, Volume(type="bucket", source=self.bucket, mount_path="/runs")],
            namespace=self.namespace,
        ).url


def train_on_job(
    name: str, recipe: Recipe, overrides: Sequence[str], arguments: JobArguments, resume: bool = False
) -> str:
    """Shows the job that trains a recipe, or submits it.

    Args:
        name: The recipe as given: its name, or the path of a YAML file.
        recipe: The same recipe, loaded with the overrides.
        overrides: `--section.key value` or `--section.key=value`.
        arguments: The options.
        resume: Whether there must be a run to resume; otherwise one is resumed if it is there.

    Returns:
        A description of the job, with the commands or the URL.

    Raises:
        InputError: The recipe needs something that only this machine has, you are not logged in, or the Hub rejects
            the job or cannot be reached.
    """
    refuse_local(recipe)
    if arguments.submit and get_token() is None:
        raise InputError(LOGIN)
    api = HfApi()
    with explained_rejection():
        namespace = arguments.namespace or api.whoami()["name"]
    job = build_job(name, recipe, overrides, arguments, namespace, resume)
    with explained_rejection():
        url = job.submit(api) if arguments.submit else None
    place = f"hf://buckets/{job.bucket}/{job.name}"
    published = recipe.hub.repo_id if recipe.hub else None
    lines = [
        f"files to upload: {job.folder}",
        f"run folder: {place} (private); to fetch it: hf buckets sync {place} runs/{job.name}",
        f"published to: {published}" if published else "not published (hub.repo_id is not set)",
        "a job that is stopped or fails is continued by its next attempt, or by the same command",
    ]
    if url is None:
        return "\n".join([*lines, "nothing was submitted: pass --submit, or run these commands:", "", job.render()])
    return "\n".join([f"job: {url}", *lines, f"to follow it: hf jobs logs -f {namespace}/{url.rpartition('/')[2]}"])


def refuse_local(recipe: Recipe):
    """Rejects a recipe whose data, base model, tokenizer or judge is on this machine.

    Raises:
        InputError: Names the key and what to do.
    """
    data, judge = recipe.data.path or "", getattr(recipe.evaluation, "judge", None)
    remote = data.startswith("synthetic:") or (is_url(data) and not data.startswith("file:"))
    is_prepared = has_tokens(data)
    if data and not remote and (data.startswith("file:") or is_prepared or find_source(data)):
        address = f"{'hf://datasets/' if is_prepared else ''}user/name"
        raise InputError(
            f"data.path '{data}' is on this machine, and the job cannot read it: upload it with `hf upload user/name "
            f"{quote_path(data)} --repo-type dataset --private`, and pass --data.path {address}"
        )
    for section in ("model", "tokenizer"):
        path = getattr(recipe, section).path
        if path is not None and Path(path).expanduser().exists():
            raise InputError(
                f"{section}.path '{path}' is on this machine, and the job cannot read it: publish it with `hfgpt "
                f"publish {quote_path(path)} user/name`, and pass --{section}.path user/name"
            )
    if judge and judge.base_url and urlsplit(judge.base_url).hostname in LOCAL_HOSTS:
        raise InputError(
            f"evaluation.judge.base_url '{judge.base_url}' is on this machine, and the job cannot reach it: use an "
            "endpoint on the internet, or leave it out"
        )


def find_secret_names(recipe: Recipe) -> list[str]:
    """Names of the environment variables that the job needs as secrets.

    Raises:
        InputError: A necessary one is not set.
    """
    from hfgpt.evaluation.judge import API_KEY  # imports torch

    names = ["HF_TOKEN"]
    judge = getattr(recipe.evaluation, "judge", None)
    if judge and judge.base_url and os.environ.get(API_KEY):  # not every endpoint needs one
        names.append(API_KEY)
    if "wandb" in recipe.training.report_to:
        if not os.environ.get("WANDB_API_KEY"):
            raise InputError("training.report_to is 'wandb', but WANDB_API_KEY is not set: set it to your API key")
        names.append("WANDB_API_KEY")
    return names


def build_job(
    name: str, recipe: Recipe, overrides: Sequence[str], arguments: JobArguments, namespace: str, resume: bool
) -> Job:
    """The job that trains a recipe; the folder to upload is written to the Hugging Face cache."""
    source = find_recipe(name)
    file = None if source.parent == recipe_folder() else source  # the package has the others
    run = re.sub("[^A-Za-z0-9_-]", "-", Path(recipe.training.output_dir).name)  # it is also a label of the job
    folder, place = write_job_folder(run, recipe, file), f"/runs/{run}"
    several = ["torchrun", "--standalone", f"--nproc_per_node={arguments.gpus}"]
    words = ["exec", "uv", "run", "--no-project", "--with-requirements", "/job/requirements.txt"]
    words += [*(several if arguments.gpus > 1 else ["python"]), "-m", "hfgpt", "train"]
    words += [f"/job/{file.name}" if file else source.stem, *overrides, "--training.output_dir", place]
    resumes = "--resume" if resume else f"$(test -e {place}/{RECIPE_FILE} && echo --resume)"
    return Job(run, namespace, folder, f"{shlex.join(words)} {resumes}", find_secret_names(recipe), arguments)


def write_job_folder(run: str, recipe: Recipe, file: Path | None) -> Path:
    """Writes the folder to upload: the package, its requirements and the recipe.

    Its name has a hash of its content, so that the files of a running job never change.

    Args:
        run: Name of the run.
        recipe: The recipe.
        file: The file of the recipe; None: it is part of the package.
    """
    from hfgpt.hub.card import TEMPLATE, card_folder  # imports torch, which a misspelled flavor does not wait for

    package = Path(hfgpt.__file__).parent
    sources = {f"hfgpt/{path.relative_to(package)}": path for path in package.rglob("*") if path.is_file()}
    sources |= {f"hfgpt/recipes/{path.name}": path for path in recipe_folder().glob("*.yaml")}
    sources[f"hfgpt/model_cards/{TEMPLATE}"] = card_folder() / TEMPLATE
    if file:
        sources[file.name] = file
    contents = {name: path.read_bytes() for name, path in sorted(sources.items()) if "__pycache__" not in name}
    contents["requirements.txt"] = "".join(f"{line}\n" for line in find_requirements(recipe)).encode()
    digest = hashlib.sha256(repr(contents).encode()).hexdigest()
    folder = cache_folder(None) / "jobs" / f"{run}-{digest[:12]}"
    if not folder.is_dir():
        folder.parent.mkdir(exist_ok=True)
        with appearing_folder(folder) as staging:
            for name, content in contents.items():
                (staging / name).parent.mkdir(parents=True, exist_ok=True)
                (staging / name).write_bytes(content)
    return folder


def find_requirements(recipe: Recipe) -> list[str]:
    """The requirements of hfgpt for a recipe, with those of its reports and of quantization.

    Raises:
        InputError: hfgpt is not installed.
    """
    try:
        requirements = [Requirement(line) for line in importlib.metadata.requires("hfgpt") or []]
    except importlib.metadata.PackageNotFoundError as error:
        raise InputError("hfgpt is not installed, so its requirements are unknown: install it with pip") from error
    extra = "quantization" if recipe.model.load_in_4bit else ""
    needed = [entry for entry in requirements if entry.marker is None or entry.marker.evaluate({"extra": extra})]
    return [*(f"{entry.name}{entry.specifier}" for entry in needed), *sorted(REPORTERS & {*recipe.training.report_to})]


@contextmanager
def explained_rejection() -> Iterator[None]:
    """Turns errors of the Hub and of the connection into one line.

    Raises:
        InputError: You are not logged in, or the Hub rejects the job or cannot be reached.
    """
    try:
        yield
    except (HTTPError, OSError) as error:
        status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else 0
        said = " ".join(str(getattr(error, "server_message", None) or error).split())[:200]
        if isinstance(error, LocalTokenNotFoundError) or status == 401:
            fault = LOGIN
        elif isinstance(error, OfflineModeIsEnabled):
            fault = "cannot reach the Hub, since HF_HUB_OFFLINE is set: unset it"
        elif status == 402:
            fault = f"the Hub rejected the job ({said}): add credits at {constants.ENDPOINT}/settings/billing"
        elif status == 403:
            fault = f"no permission to run jobs ({said}): use a token that may start jobs, or another --namespace"
        elif 400 <= status < 500:
            fault = f"the Hub rejected the job ({said}): fix this and submit it again"
        else:
            fault = f"cannot reach the Hub ({said}): submit the job again later"
        raise InputError(fault) from error
