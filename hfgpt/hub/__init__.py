"""Publishing: a card of what was measured, checks before anything leaves the machine, an upload in one commit."""

from dataclasses import dataclass
from typing import Literal

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from hfgpt.errors import InputError


@dataclass
class HubArguments:
    """The recipe's section `hub`: where a run is published, and what its card says that no run can know.

    Args:
        repo_id: `user/name`; None: the run is not published.
        private: Whether a new repository is private.
        strategy: `end` publishes the finished run; `checkpoints` also each checkpoint, in the background.
        native_branch: Whether the branch `gpt2` of the repository gets the model as a native GPT-2.
        license: Of the weights, as the Hub writes it: apache-2.0, mit, cc-by-4.0, ...
        author: For the citation on the card, as BibTeX writes names: Ada Lovelace and Charles Babbage.
        url: For the citation on the card: of a paper, a project or the repository.
        language: Codes of the languages the model writes or reads: [en].
        base_model: Hub id of the base model, where the recipe names a folder.
        base_revision: Its branch, tag or commit; None: what is newest when an adapter is published.
        data_license: Of the training data, as its owner gives it.
        energy_kwh: Of the training, as a meter showed it, in kWh.
    """

    repo_id: str | None = None
    private: bool = True
    strategy: Literal["end", "checkpoints"] = "end"
    native_branch: bool = False
    license: str | None = None
    author: str | None = None
    url: str | None = None
    language: list[str] | None = None
    base_model: str | None = None
    base_revision: str | None = None
    data_license: str | None = None
    energy_kwh: float | None = None

    def __post_init__(self):
        for name in ("repo_id", "base_model"):
            if getattr(self, name) is not None:
                check_repo_id(f"hub.{name}", getattr(self, name), owned=name == "repo_id")
        if self.energy_kwh is not None and not self.energy_kwh > 0:
            raise InputError(f"hub.energy_kwh is {self.energy_kwh}; it must be above 0, as a meter showed it")


def check_repo_id(name: str, repo_id: str, owned: bool = True):
    """Refuses what is no id of a repository.

    Args:
        name: What is checked, for the message.
        repo_id: Such as `user/name`.
        owned: Whether it must say whose it is.

    Raises:
        InputError: It is none.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InputError(f"{name} '{repo_id}' is not a repository id ({error}): write user/name") from error
    if owned and "/" not in repo_id:
        raise InputError(f"{name} '{repo_id}' does not say whose it is: write it user/{repo_id}")
