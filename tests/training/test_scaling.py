"""The law of the expected loss: the numbers in the package are those fitted to the measured runs."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from hfgpt.training import scaling
from hfgpt.training.scaling import SHAPES, Outlook

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("scaling_benchmark", FOLDER / "scaling.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_numbers_are_those_of_the_measured_runs(benchmark):
    law = benchmark.fit(benchmark.read_table())
    ours = [np.log(scaling.FACTOR), scaling.CONTEXT]
    for factor, exponent in (scaling.WEIGHTS, scaling.TOKENS):
        ours += [np.log(factor), exponent]
    assert ours == pytest.approx(law, abs=0.005)
    errors = benchmark.errors_by_text(benchmark.read_table())
    assert len(errors) == 5
    assert benchmark.spread_of(errors) == pytest.approx(scaling.SPREAD, abs=0.001)


def test_the_law_of_the_package_is_the_fitted_one(benchmark):
    runs = benchmark.read_table()
    law = benchmark.fit(runs)
    expected = [
        Outlook(run["layers"], run["width"], run["context"], run["tokens"]).expect_loss(run["ngrams"]) for run in runs
    ]
    fitted = np.exp(benchmark.residuals(law, runs)) * [run["loss"] for run in runs]
    assert expected == pytest.approx(fitted, rel=0.005)


def test_the_runs_had_the_batch_size_of_the_package(benchmark):
    for run in benchmark.read_table():
        outlook = Outlook(run["layers"], run["width"], run["context"], run["tokens"])
        assert outlook.steps * outlook.rows * run["context"] == pytest.approx(run["tokens"], rel=0.01)


def test_the_expected_loss_falls_with_size_and_tokens_but_hardly_with_a_text_read_again_and_again():
    losses = [Outlook(layers, width, 128, 1e8).expect_loss(2.0) for layers, width in SHAPES]
    assert losses == sorted(losses, reverse=True)
    losses = [Outlook(4, 128, 128, tokens).expect_loss(2.0) for tokens in (1e5, 1e6, 1e7, 1e8)]
    assert losses == sorted(losses, reverse=True)
    unlimited, once, often = (Outlook(4, 128, 128, tokens, 1e6) for tokens in (1e6, 4e6, 1e9))
    assert unlimited.expect_loss(2.0) == Outlook(4, 128, 128, 1e6).expect_loss(2.0)
    assert (
        Outlook(4, 128, 128, 4e6).expect_loss(2.0)
        < once.expect_loss(2.0)
        < 1.01 * Outlook(4, 128, 128, 4e6).expect_loss(2.0)
    )
    assert often.expect_loss(2.0) == pytest.approx(Outlook(4, 128, 128, 16e6).expect_loss(2.0))


@pytest.mark.parametrize(
    ("outlook", "dropout"),
    [
        (Outlook(2, 64, 64, 1e8), 0.0),  # unlimited text
        (Outlook(4, 128, 64, 5.5e6, 1e6), 0.0),  # measured: 0.2 makes it worse by 0.14 nats
        (Outlook(4, 128, 64, 1.5e7, 1e6), 0.1),
        (Outlook(6, 384, 64, 1.3e7, 1e6), 0.2),  # the recipe shakespeare-baby
    ],
)
def test_dropout_is_for_large_models_that_read_a_text_often(outlook, dropout):
    assert outlook.dropout == dropout
    assert outlook.values()["model.resid_pdrop"] == outlook.values()["model.embd_pdrop"] == dropout
