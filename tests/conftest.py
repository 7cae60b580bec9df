"""Settings shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# One computing thread in each process of a test, set before torch is imported: what tests compute is tiny, and threads that
# wait for one another on busy cores take many times the processor time of the work.
os.environ["OMP_NUM_THREADS"] = "1"

# How long an example takes depends on what else the machine does.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


def pytest_addoption(parser: pytest.Parser) -> None:
    """What is not on every machine; the tests that need it skip without it."""
    parser.addoption("--megatron-deepspeed", metavar="DIR", help="a checkout of Megatron-DeepSpeed to test against")
    parser.addoption(
        "--megatron-deepspeed-python", metavar="PYTHON", help="python of that checkout's environment, with deepspeed: train in it"
    )
    parser.addoption("--megatron-lm", metavar="DIR[,DIR...]", help="checkouts of Megatron-LM (core_v0.13 to main) to test against")
    parser.addoption("--several-hosts", action="store_true", help="also run jobs on several hosts, made of network namespaces (needs root)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip tests marked ``gpu`` on machines without a CUDA device; in workers of pytest-xdist begin with what takes longest."""
    if hasattr(config, "workerinput"):
        # A whole file goes to one worker: a long one that comes last would be waited for by all the others.
        long = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: item.path not in long)
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))


@pytest.fixture(scope="session")
def megatron_deepspeed(pytestconfig: pytest.Config) -> Path:
    """The checkout of ``--megatron-deepspeed``. Tests copy what they change, the checkout itself stays as it is."""
    given = pytestconfig.getoption("--megatron-deepspeed")
    if not given:
        pytest.skip("needs a checkout: pytest --megatron-deepspeed=DIR")
    return _checkout(given, "--megatron-deepspeed")


@pytest.fixture(scope="session")
def megatron_deepspeed_python(pytestconfig: pytest.Config) -> Path:
    """The python of ``--megatron-deepspeed-python``."""
    given = pytestconfig.getoption("--megatron-deepspeed-python")
    if not given:
        pytest.skip("needs the checkout's environment: pytest --megatron-deepspeed=DIR --megatron-deepspeed-python=PYTHON")
    return Path(given).absolute()


@pytest.fixture(scope="session")
def megatron_lm_checkouts(pytestconfig: pytest.Config) -> list[Path]:
    """The checkouts of ``--megatron-lm``, at least one. Tests copy what they change, the checkouts themselves stay as they are."""
    given = pytestconfig.getoption("--megatron-lm")
    if not given:
        pytest.skip("needs checkouts: pytest --megatron-lm=DIR[,DIR...]")
    return [_checkout(directory, "--megatron-lm") for directory in given.split(",")]


def _checkout(directory: str, option: str) -> Path:
    path = Path(directory).resolve()
    if not (path / "pretrain_gpt.py").is_file():
        pytest.fail(f"{option} {directory}: no pretrain_gpt.py in there, so that is no such checkout")
    return path
