"""A time budget: the choice of the model, its forecast, the time that a run takes, and resuming it."""

import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from rich.console import Console

from hfgpt.durations import Budget
from hfgpt.errors import InputError, Interrupted
from hfgpt.records import Forecast, RunRecord
from hfgpt.runs import budget as module
from hfgpt.runs.messages import describe_forecast
from hfgpt.training.scaling import Outlook

SMALL = ((1, 16), (2, 32), (2, 64))


@pytest.fixture(scope="module")
def steady():
    """A machine on which a token takes 20 ns per weight, and on which little else takes time."""

    def probe(model, arguments, block_size, seconds):
        weights = 12 * model.config.num_hidden_layers * model.config.hidden_size**2
        return 2e-8 * weights * block_size, 1e-3

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "probe_seconds", probe)
        patch.setattr(module, "PLANNING", 0.2)
        patch.setattr(module, "RECORDING", 0.2)
        patch.setattr(module, "SHAPES", SMALL)
        yield


@pytest.fixture(scope="module")
def budgeted(steady, train, tmp_path_factory):
    return train(tmp_path_factory.mktemp("budget") / "run", budget=Budget(2.0))


def read(folder: Path) -> tuple[dict, RunRecord]:
    return yaml.safe_load((folder / "recipe.yaml").read_text()), RunRecord.read(folder)


def test_a_run_trains_the_chosen_model_for_the_time_that_is_left(budgeted):
    recipe, record = read(budgeted.folder)
    model, training = recipe["model"], recipe["training"]
    assert (model["num_hidden_layers"], model["hidden_size"]) in SMALL
    assert record.architecture["hidden_size"] == model["hidden_size"]
    assert model["max_position_embeddings"] == 32  # the recipe's
    assert training["max_steps"] == -1
    assert 0 < training["max_seconds"] < 2
    assert record.actual["training_seconds"] == pytest.approx(training["max_seconds"], abs=0.5)


def test_the_forecast_is_shown_before_and_after(budgeted):
    forecast = read(budgeted.folder)[1].forecast
    assert forecast.low < forecast.loss < forecast.high
    assert f" for the evaluation and the records; forecast of the loss: {forecast.describe()}\n" in budgeted.shown
    assert describe_forecast(forecast, budgeted.metrics["eval_loss"]) + "\n" in budgeted.shown


@pytest.mark.parametrize(("loss", "place"), [(1.7, "below"), (1.75, "within"), (1.9, "within"), (2.0, "above")])
def test_the_end_says_whether_the_forecast_was_right(loss, place):
    said = describe_forecast(Forecast(loss=1.8512, low=1.75, high=1.95), loss)
    assert said == f"forecast: 1.851 nats per token (1.750 to 1.950); the loss is {place} the interval"


@pytest.mark.parametrize(
    ("outlook", "ngrams", "reason"),
    [
        (Outlook(2, 64, 64, 1e6, 1e6), [3.0, 2.4, 1.8], None),
        (Outlook(4, 768, 64, 1e6, 1e9), [3.0, 2.4, 1.8], None),
        (Outlook(5, 768, 64, 1e6, 1e9), [3.0, 2.4, 1.8], "the run is more than ten times larger than the measured"),
        (Outlook(2, 64, 64, 1e8, 1e9), [3.0, 2.4, 1.8], "the run is more than ten times larger than the measured"),
        (Outlook(2, 64, 64, 1e6, 1e6), [3.0, 2.4, 1.4], "the text repeats itself much more than those"),
        (Outlook(4, 128, 64, 2e7, 1e6), [3.0, 2.4, 1.8], "the model may overfit in about 20 epochs"),
    ],
)
def test_there_is_no_forecast_for_what_was_not_measured(outlook, ngrams, reason):
    cpu, budget = torch.device("cpu"), Budget(60, ["--model.hidden_size", "64", "--data.path", "text.txt"])
    said = module.why_unknown(outlook, ngrams, budget, cpu)
    assert (said is None) if reason is None else said.startswith(reason)
    said = module.why_unknown(outlook, ngrams, Budget(60), torch.device("cuda"))
    assert said == "the scaling law was measured on CPUs only"
    said = module.why_unknown(outlook, ngrams, Budget(60, ["--training.learning_rate=0.1"]), cpu)
    assert said == "--training.learning_rate may differ from that of the measured runs"


def test_a_resumed_run_keeps_its_choice(steady, train, tmp_path):
    stop = {"during": lambda step: signal.raise_signal(signal.SIGTERM) if step == 5 else None}
    with pytest.raises(Interrupted):
        train(tmp_path / "run", budget=Budget(2.0), **stop)
    recipe, record = read(tmp_path / "run")
    run = train(tmp_path / "run", budget=Budget(60.0), resume=True)
    assert read(run.folder)[0] == recipe
    assert read(run.folder)[1].forecast == record.forecast
    assert "resuming from checkpoint-5: step 5 (token" in run.shown


def choose(load, seconds: float, *overrides: str, folder: Path) -> dict:
    """The choice for a budget, of which no time passes."""
    recipe = load(folder, *overrides)
    data = module.TASK.load(recipe)
    budget = Budget(seconds, [f"--{override}" for override in overrides])
    still = SimpleNamespace(seconds=seconds, left=seconds, fixed=budget.fixed)
    return module.fit_to_budget(recipe, data, still, Console(quiet=True))[0].values


def test_more_time_is_for_larger_models(steady, load, tmp_path):
    widths = [choose(load, seconds, folder=tmp_path)["model"]["hidden_size"] for seconds in (1, 30, 3000)]
    assert widths == sorted(widths)
    assert widths[0] < widths[-1]


def test_keys_on_the_command_line_keep_their_values(steady, load, tmp_path):
    fixed = ("model.num_hidden_layers=3", "training.per_device_train_batch_size=7", "training.learning_rate=0.002")
    values = choose(load, 10, *fixed, folder=tmp_path)
    assert values["model"]["num_hidden_layers"] == 3
    assert values["model"]["hidden_size"] in {width for _, width in SMALL}
    assert values["training"]["per_device_train_batch_size"] == 7
    assert values["training"]["learning_rate"] == 0.002
    assert values["training"]["muon_learning_rate"] == 0.03


def test_the_context_length_of_a_preset_is_kept(steady, load, tmp_path):
    overrides = ["data.block_size=300", "model.preset=gpt2", "data.max_documents=40"]
    sizes = [f"model.{name}=null" for name in ("hidden_size", "num_hidden_layers", "max_position_embeddings")]
    recipe = load(tmp_path, *overrides, *sizes)
    data = module.TASK.load(recipe)
    still = SimpleNamespace(seconds=10, left=10, fixed=set())
    model = module.fit_to_budget(recipe, data, still, Console(quiet=True))[0].values["model"]
    assert model["max_position_embeddings"] == 1024
    assert model["hidden_size"] in {width for _, width in SMALL}


@pytest.mark.parametrize("bytes_too_many", [2**60, None])
def test_models_that_do_not_fit_into_memory_are_left_out(bytes_too_many, steady, load, tmp_path, monkeypatch):
    probe, most = module.probe_seconds, 16

    def probe_with_little_memory(model, *others):
        if model.config.hidden_size <= most:
            return probe(model, *others)
        if bytes_too_many is None:
            raise torch.OutOfMemoryError
        torch.empty(bytes_too_many, dtype=torch.uint8)

    monkeypatch.setattr(module, "probe_seconds", probe_with_little_memory)
    assert choose(load, 3000, folder=tmp_path)["model"]["hidden_size"] == 16
    most = 0
    with pytest.raises(InputError, match="has too little memory for"):
        choose(load, 3000, folder=tmp_path)


def test_a_budget_that_leaves_no_time_is_refused_and_leaves_nothing(steady, train, tmp_path):
    said = (
        r"^--budget is 0 s, which is too short: everything but the training takes about \d+ s, .*; raise it, or evalu"
    )
    with pytest.raises(InputError, match=said):
        train(tmp_path / "run", budget=Budget(0.1))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("task", "path", "processes", "message"),
    [
        ("classify", None, 1, "this recipe does not train a new language model"),
        ("pretrain", "runs/base", 1, "this recipe does not train a new language model"),
        ("pretrain", None, 2, "--budget is for one process, and there are 2"),
    ],
)
def test_recipes_that_a_budget_cannot_change_are_refused(task, path, processes, message):
    training = SimpleNamespace(world_size=processes)
    with pytest.raises(InputError, match=f"^{message}.*: leave out --budget, and pass --training.max_seconds"):
        module.check_budget(
            SimpleNamespace(task=task, model=SimpleNamespace(path=path), training=training), Budget(60)
        )


def test_a_preset_on_the_command_line_is_refused(load, tmp_path):
    with pytest.raises(InputError, match=r"as does --model.preset: remove one of them"):
        module.check_budget(load(tmp_path), Budget(60, ["--model.preset", "gpt2"]))


def test_a_budget_without_time_for_the_smallest_model_measures_no_other(steady, load, tmp_path, monkeypatch):
    probe, widths = module.probe_seconds, []
    monkeypatch.setattr(
        module, "probe_seconds", lambda m, *rest: widths.append(m.config.hidden_size) or probe(m, *rest)
    )
    with pytest.raises(InputError, match="which is too short"):
        choose(load, 0.1, folder=tmp_path)
    assert widths == [SMALL[0][1]]


def test_only_models_that_the_given_heads_divide_are_measured(steady, load, tmp_path):
    def shapes(heads: int) -> list[tuple[int, int]]:
        override = f"model.num_attention_heads={heads}"
        return module.shapes_of(load(tmp_path, override), Budget(60, [f"--{override}"]))

    assert shapes(32) == [(2, 32), (2, 64)]
    with pytest.raises(
        InputError, match=r"hidden sizes that --budget chooses from is divisible by 7 heads: also pass --model.hid"
    ):
        shapes(7)
