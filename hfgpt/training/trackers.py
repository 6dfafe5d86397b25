"""Experiment trackers of `training.report_to`: checks before a run, and errors in one line during it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec

from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from hfgpt.errors import InputError

# Modules and packages whose name is not that of the tracker.
MODULES = {"azure_ml": "azureml", "flyte": "flytekit"}
PACKAGES = {"azure_ml": "azureml-sdk", "comet_ml": "comet-ml", "dagshub": "dagshub mlflow", "flyte": "flytekit"}


def check_installed(report_to: str | Sequence[str] | None):
    """Checks that all trackers exist and are installed.

    Raises:
        InputError: Names the tracker and the command that installs it.
    """
    for name in [report_to] if isinstance(report_to, str) else report_to or []:
        if name in ("none", "all", "kubeflow"):  # kubeflow has no package
            continue
        if name not in INTEGRATION_TO_CALLBACK:
            raise InputError(f"training.report_to is '{name}'; it must be one of {', '.join(INTEGRATION_TO_CALLBACK)}")
        found = [MODULES.get(name, name), *(["tensorboardX"] if name == "tensorboard" else [])]
        if not any(map(find_spec, found)):
            command = f"pip install {PACKAGES.get(name, name)}"
            raise InputError(f"training.report_to is '{name}', which is not installed: run {command}")


def check_login(report_to: Sequence[str]):
    """Checks that the tracker's service can be used, before any work is done; on a terminal, wandb asks for a key.

    Raises:
        InputError: You are not logged in, or the service cannot be reached.
    """
    if "wandb" in report_to:
        import wandb

        with explained_errors(report_to):
            wandb.login()  # does nothing if the environment variable WANDB_MODE is offline or disabled


@contextmanager
def explained_errors(report_to: Sequence[str]) -> Iterator[None]:
    """Reports the errors that a tracker's package defines in one line.

    Raises:
        InputError: A tracker failed.
    """
    try:
        yield
    except Exception as error:
        name = type(error).__module__.partition(".")[0]
        if name not in report_to:
            raise
        remedy = ", or set the environment variable WANDB_MODE=offline" if name == "wandb" else ""
        raise InputError(
            f"training.report_to: {name} failed ({' '.join(str(error).split())[:300]}): fix this{remedy}, or leave "
            f"{name} out"
        ) from error
