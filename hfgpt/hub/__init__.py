"""Publishing to the Hub: the model card, checks before anything is uploaded, and the upload in one commit."""

from dataclasses import dataclass
from typing import Literal

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from hfgpt.errors import InputError


@dataclass
class HubArguments:
    """The recipe's section `hub`: where to publish a run, and details for its model card that are not recorded.

    Args:
        repo_id: `user/name`; None: the run is not published.
        private: Whether a new repository is private.
        strategy: `end` publishes the finished run; `checkpoints` also publishes each checkpoint, in the background.
        native_branch: Whether to publish the model also as a native GPT-2, on the branch `gpt2`.
        license: License of the weights, as a Hub identifier: apache-2.0, mit, cc-by-4.0, ...
        author: Authors for the citation, in BibTeX form: Ada Lovelace and Charles Babbage.
        url: URL for the citation: a paper, a project page or the repository.
        language: Language codes of the texts that the model reads or writes: [en].
        base_model: Hub id of the base model, if the recipe names a local folder.
        base_revision: Branch, tag or commit of the base model; None: the newest commit when an adapter is published.
        data_license: License of the training data.
        energy_kwh: Metered energy use of the training, in kWh.
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
            raise InputError(f"hub.energy_kwh is {self.energy_kwh}; it must be above 0")


def check_repo_id(name: str, repo_id: str, owned: bool = True):
    """Checks a repository id.

    Args:
        name: Name of the argument in the error message.
        repo_id: Such as `user/name`.
        owned: Whether it must have a namespace.

    Raises:
        InputError: It is invalid.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InputError(
            f"{name} '{repo_id}' is not a valid repository id ({error}): use the form user/name"
        ) from error
    if owned and "/" not in repo_id:
        raise InputError(f"{name} '{repo_id}' has no namespace: use user/{repo_id}")
