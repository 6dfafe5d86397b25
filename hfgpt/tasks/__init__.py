"""The recipe tasks by name."""

from hfgpt.tasks.classify import Classification
from hfgpt.tasks.instruct import Instructions
from hfgpt.tasks.pretrain import Pretraining
from hfgpt.tasks.task import Task

TASKS: dict[str, Task] = {"pretrain": Pretraining(), "classify": Classification(), "instruct": Instructions()}
