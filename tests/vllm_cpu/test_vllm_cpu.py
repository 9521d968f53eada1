"""VLLMEngine and the trainers beside a real vLLM, which serves SmolLM2-135M-Instruct in bfloat16."""

import copy
import sys
import threading
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlkernels.trainers import GRPOConfig, GRPOTrainer, SamplingOptions, VLLMEngine
from rlkernels.trainers.base.reporting import CurvesCallback
from vllm_process import Server

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import smollm2

PROMPTS = ["The capital of France is", "Once upon a time", "2 + 2 =", "def main():", "Dear reader,", "The moon"]


@pytest.fixture(scope="session")
def folder():
    return smollm2.model_folder()


@pytest.fixture(scope="session")
def server(folder, tmp_path_factory):
    options = ["--dtype", "bfloat16", "--max-model-len", "512", "--enforce-eager"]
    server = Server(folder, tmp_path_factory.mktemp("vllm") / "log", *options)
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="session")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def changed(model):
    """The model some way off, in its embeddings and its head, which are one, too."""
    torch.manual_seed(0)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for weight in other.parameters():
            weight += 0.05 * weight.std() * torch.randn_like(weight)
    return other


@pytest.fixture
def engine(server, model, tokenizer, tmp_path):
    return VLLMEngine(model, tokenizer, server.url, tmp_path / "weights")


@torch.no_grad()
def logprobs(model, rollouts, temperature):
    """Log-probabilities of all tokens of all rollouts, end to end."""
    found = []
    for rollout in rollouts:
        logits = model(torch.tensor([rollout.prompt_ids + rollout.completion_ids])).logits[0].float() / temperature
        start, count = len(rollout.prompt_ids) - 1, len(rollout.completion_ids)
        found.append(logits.log_softmax(-1)[range(start, start + count), rollout.completion_ids])
    return torch.cat(found)


def distance(model, rollouts, temperature):
    """Mean difference of the served log-probabilities from the model's in float32, in units of what bfloat16 makes of
    the model itself."""
    exact = logprobs(model, rollouts, temperature)
    rounding = (logprobs(copy.deepcopy(model).bfloat16(), rollouts, temperature) - exact).abs().mean()
    served = torch.tensor([value for rollout in rollouts for value in rollout.logprobs])
    return ((served - exact).abs().mean() / rounding).item()


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.3])
def test_served_logprobs_are_those_of_the_weights_that_were_sent(temperature, engine, model, changed):
    options = SamplingOptions(temperature, max_completion_length=24, logprobs=True, seed=1)
    for step, (now, other) in enumerate([(model, changed), (changed, model), (model, changed)]):
        engine.update_weights(lambda folder, now=now: write(now, folder), step)
        rollouts = engine(PROMPTS, options)
        assert distance(now, rollouts, temperature) < 2
        assert distance(other, rollouts, temperature) > 10
        if temperature != 1.0:
            assert distance(now, rollouts, 1.0) > 4
        assert all(rollout.ended or len(rollout.completion_ids) == 24 for rollout in rollouts)


def write(model, folder):
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=weights)


def test_the_same_seeds_give_the_same_completions(engine):
    options = SamplingOptions(1.0, max_completion_length=16, seed=3)
    first, again = (engine(["Once upon a time"] * 4, options) for _ in range(2))
    assert len({tuple(rollout.completion_ids) for rollout in first}) == 4
    same = sum(a.completion_ids == b.completion_ids for a, b in zip(first, again, strict=True))
    assert same >= 3  # in bfloat16 the batch that a row shares may move it


def test_killed_amid_requests_nothing_is_lost(engine, server, model, changed):
    """kill -9, and a restart, by which it has the weights that it was started with."""
    engine.update_weights(lambda folder: write(changed, folder), 1)
    options = SamplingOptions(1.0, max_completion_length=96, logprobs=True)
    prompts = PROMPTS * 8
    killed = threading.Event()

    def restart():
        server.kill()
        killed.set()
        server.start(wait=False)

    timer = threading.Timer(3.0, restart)
    timer.start()
    rollouts = engine(prompts, options)
    assert killed.is_set()  # else it was done before
    timer.join()
    read = [rollout.prompt_ids for rollout in rollouts]
    assert read == engine.tokenizer(prompts)["input_ids"]
    assert all(rollout.ended or len(rollout.completion_ids) == 96 for rollout in rollouts)
    assert distance(changed, rollouts, 1.0) < 2
    assert max(distance(changed, [rollout], 1.0) for rollout in rollouts) < 5


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_run(staleness, server, folder, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(CurvesCallback, "on_train_end", lambda *args, **kwargs: None)

    def short(completion_ids, **columns):
        return [-float(len(set(ids))) for ids in completion_ids]

    config = GRPOConfig(
        output_dir=str(tmp_path / "run"),
        vllm_server_base_url=server.url,
        staleness=staleness,
        importance_sampling_correction=True,
        importance_sampling_mode="token_truncate",
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=16,
        temperature=0.9,
        learning_rate=2e-5,
        lr_scheduler_type="constant",
        max_steps=4,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
    )
    rows = [{"prompt": prompt} for prompt in PROMPTS]
    trainer = GRPOTrainer(str(folder), short, config, rows, None, tokenizer)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    ratios = [log["sampling/importance_sampling_ratio/mean"] for log in logs]
    assert ratios[0] == pytest.approx(1.0, abs=0.02)
    if staleness:
        assert [log["sampling/staleness"] for log in logs] == [0, 1, 1, 1]
    else:
        assert ratios == pytest.approx([1.0] * 4, abs=0.02)
    # The last weights are served.
    model = trainer.model.float().eval()
    options = SamplingOptions(0.9, max_completion_length=16, logprobs=True)
    trainer.collector.update_weights()
    rollouts = trainer.collector.engine(PROMPTS, options)
    assert distance(model, rollouts, 0.9) < 2
