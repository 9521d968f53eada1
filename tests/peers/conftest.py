"""What the tests beside other projects share. They run in .venv-peers, by `make test-peers`."""

import pytest

import peer_modules


def load(project, module):
    try:
        return project(module)
    except ModuleNotFoundError as error:
        pytest.skip(f"{error.name} is not installed: make test-peers")


@pytest.fixture(scope="session")
def core_algos():
    """verl's advantages, KL penalties and losses."""
    return load(peer_modules.verl, "trainer.ppo.core_algos")


@pytest.fixture(scope="session")
def verl_functional():
    """verl's masked means and whitening, and log-probabilities."""
    return load(peer_modules.verl, "utils.torch_functional")


@pytest.fixture(scope="session")
def openrlhf():
    """openrlhf("models.loss") gives that module."""
    return lambda module: load(peer_modules.openrlhf, module)
