"""In the processes of Ray's workers, where verl's and OpenRLHF's actors live, one setting puts ours in place."""

import os
import sys

import pytest

pytest.importorskip("ray")


@pytest.fixture
def workers(monkeypatch):
    """Starts Ray with a hook for its workers; gives what runs a function in one."""
    import ray

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # which no worker could import
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_worker_register_timeout_seconds", "600")  # the hook imports PyTorch, on a busy machine too

    def start(hook):
        runtime_env = {"worker_process_setup_hook": hook}
        ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, runtime_env=runtime_env)
        return lambda function: ray.get(ray.remote(function).remote(), timeout=600)

    yield start
    ray.shutdown()


def registered():
    from verl.trainer.ppo import core_algos

    return core_algos.get_adv_estimator_fn("rk_grpo").__module__, core_algos.agg_loss.__module__


def test_setup_hook_patches_verl_in_each_worker(workers):
    run = workers("rlkernels.integrations.verl.patch")
    assert run(registered) == ("rlkernels.integrations._verl_advantages", "rlkernels.integrations._verl_aggregation")


def patch_openrlhf():
    """In place of "rlkernels.integrations.openrlhf.patch", since what OpenRLHF imports is not installed."""
    import peer_modules
    import rlkernels.integrations.openrlhf

    for module in ("models.utils", "models.loss", "trainer.ppo_utils.experience_maker"):
        peer_modules.openrlhf(module)
    rlkernels.integrations.openrlhf.patch()


def aggregate_loss():
    from openrlhf.models import loss

    return loss.aggregate_loss.__module__


@pytest.mark.thorough
def test_setup_hook_patches_openrlhf_in_each_worker(workers):
    run = workers(patch_openrlhf)
    assert run(aggregate_loss) == "rlkernels.integrations._openrlhf_losses"
