"""The law of the expected loss: the numbers in the package are those fitted to the measured runs."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from hfgpt.training import scaling
from hfgpt.training.scaling import Outlook

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
