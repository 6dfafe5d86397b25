"""Experiment trackers: refused before a run if they cannot be used; their errors are one line."""

import re
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest

from hfgpt.errors import InputError
from hfgpt.training import trackers
from hfgpt.training.arguments import HfGPTTrainingArguments
from hfgpt.training.trackers import check_login, explained_errors


@pytest.mark.parametrize(
    ("report_to", "message"),
    [
        ("tensorboard", "training.report_to is 'tensorboard', which is not installed: run pip install tensorboard"),
        (["wandb"], "training.report_to is 'wandb', which is not installed: run pip install wandb"),
        ("trackio", "training.report_to is 'trackio', which is not installed: run pip install trackio"),
        (["none", "comet_ml"], "training.report_to is 'comet_ml', which is not installed: run pip install comet-ml"),
        ("azure_ml", "training.report_to is 'azure_ml', which is not installed: run pip install azureml-sdk"),
        ("tensorbord", "training.report_to is 'tensorbord'; it must be one of azure_ml, comet_ml, "),
    ],
)
def test_a_tracker_that_is_not_installed(report_to, message, monkeypatch, tmp_path):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=re.escape(message)):
        HfGPTTrainingArguments(output_dir=str(tmp_path), report_to=report_to)
    for nothing in ("none", ["none"], "all"):
        assert HfGPTTrainingArguments(output_dir=str(tmp_path), report_to=nothing).report_to in ([], ["none"])


class UsageError(Exception):
    """Like those of wandb, which are in submodules."""


UsageError.__module__ = "wandb.errors.errors"


def test_a_missing_login_is_one_line(monkeypatch):
    def login():
        raise UsageError("No API key configured.\nUse `wandb login` to log in.")

    wandb = ModuleType("wandb")
    wandb.__spec__, wandb.login = ModuleSpec("wandb", None), login
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    check_login(["tensorboard"])
    with pytest.raises(InputError) as error:
        check_login(["tensorboard", "wandb"])
    assert str(error.value) == (
        "training.report_to: wandb failed (No API key configured. Use `wandb login` to log in.): fix this, or set the "
        "environment variable WANDB_MODE=offline, or leave wandb out"
    )


def test_only_errors_of_a_tracker_are_explained():
    with pytest.raises(UsageError), explained_errors(["trackio"]):
        raise UsageError
    with pytest.raises(ZeroDivisionError), explained_errors(["wandb"]):
        raise ZeroDivisionError
