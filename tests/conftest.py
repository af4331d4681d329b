"""The fixtures that the tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import Experiment, logged
from hypothesis import HealthCheck, settings

# Each example overwrites what the one before left in the experiment's folder.
settings.register_profile("files", deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
settings.load_profile("files")


@pytest.fixture
def experiment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Experiment:
    return Experiment(tmp_path, capsys)


@pytest.fixture
def asked(experiment: Experiment) -> Experiment:
    experiment.ask("q")
    experiment.log(logged("q"))
    return experiment
