"""Settings for all tests: no hub, and in the processes that run tests what `support/plugin.py` says."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of NumPy and scikit-learn too

import pytest


def pytest_configure(config: pytest.Config) -> None:
    starts_others = config.getoption("dist", "no") != "no" and not hasattr(config, "workerinput")
    if not starts_others:  # which waits for seconds of imports before the others begin theirs
        config.pluginmanager.import_plugin("support.plugin")
