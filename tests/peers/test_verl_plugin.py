"""verl loads our module by itself, and has our estimators and losses after it."""

import importlib.metadata
import os
import subprocess
import sys
import warnings

import pytest

import verl_rows
from cases import thorough

verl_rows.rows()

LIST = """
from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY, POLICY_LOSS_REGISTRY
print(*(name for registry in (ADV_ESTIMATOR_REGISTRY, POLICY_LOSS_REGISTRY) for name in registry))
"""


def registered(script, folder, **environment):
    done = subprocess.run(
        [sys.executable, "-c", script + LIST], capture_output=True, text=True, cwd=folder, env=os.environ | environment
    )
    assert done.returncode == 0, done.stderr
    assert "no estimator" not in done.stderr
    return {name for name in done.stdout.split() if name.startswith("rk_")}


@pytest.mark.parametrize(
    "script",
    [
        "import verl, sys; assert 'rlkernels.integrations.verl' in sys.modules",
        thorough("import rlkernels.integrations.verl"),
    ],
)
def test_verl_finds_it(script, tmp_path):
    """By the entry point as it is installed, in a process that knows nothing of us."""
    from rlkernels.integrations.verl import ESTIMATORS, LOSSES

    assert registered(script, tmp_path) == ESTIMATORS.keys() | LOSSES.keys()


@pytest.mark.thorough
def test_verl_is_told_to_find_none(tmp_path):
    assert registered("import verl", tmp_path, VERL_USE_EXTERNAL_PLUGINS="none") == set()


@pytest.mark.parametrize(
    ("version", "broken"), [("0.8.3", False), ("0.10.0", False), ("1.0", False), ("0.9.1", True), (None, False)]
)
def test_unknown_verl_is_left_alone(monkeypatch, core_algos, version, broken):
    import rlkernels.integrations.verl as module

    def version_of(name):
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", version_of)
    monkeypatch.setattr(core_algos, "ADV_ESTIMATOR_REGISTRY", {})
    if broken:
        monkeypatch.delattr(core_algos, "POLICY_LOSS_REGISTRY")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module._register()
    assert core_algos.ADV_ESTIMATOR_REGISTRY == {}
    assert len(caught) == (version is not None)
    if version is not None:
        assert "no estimator and no loss named rk_* was registered" in str(caught[0].message)


@pytest.mark.parametrize(("version", "name"), [("0.9.0", "policy_loss_gspo_0_9_0"), ("0.9.1", "policy_loss_gspo")])
def test_gspo_of_each_version(monkeypatch, core_algos, version, name):
    import rlkernels.integrations.verl as module

    losses = {}
    monkeypatch.setattr(importlib.metadata, "version", lambda _: version)
    monkeypatch.setattr(core_algos, "POLICY_LOSS_REGISTRY", losses)
    module._register()
    assert losses["rk_gspo"].__name__ == name


def test_registered_stay_when_the_patch_goes(core_algos):
    from rlkernels.integrations.verl import patched

    registries = core_algos.ADV_ESTIMATOR_REGISTRY, core_algos.POLICY_LOSS_REGISTRY
    before = [dict(registry) for registry in registries]
    with patched():
        assert core_algos.ADV_ESTIMATOR_REGISTRY["gae"] is not before[0]["gae"]
        assert core_algos.POLICY_LOSS_REGISTRY["vanilla"] is core_algos.compute_policy_loss_vanilla
        for name in ("gae", "grpo", "rloo"):
            assert core_algos.ADV_ESTIMATOR_REGISTRY[f"rk_{name}"] is before[0][f"rk_{name}"]
    assert [dict(registry) for registry in registries] == before
