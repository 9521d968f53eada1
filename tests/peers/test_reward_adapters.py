"""Reward functions, theirs and ours, as verl's reward managers, OpenRLHF's executor and our trainers call them."""

import asyncio
import copy
import inspect
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import peer_modules
import peer_rewards
from rlkernels.integrations.rewards import from_openrlhf, from_verl, to_openrlhf, to_verl

FILE = Path(peer_rewards.__file__)
TEXTS = ["a bad", "bb", "aab b"]
TRUTHS = ["a", "b", "b"]


class Tokenizer:
    """A token a character; 0 is padding, 1 the end, which decoding leaves out unless it is told not to."""

    eos_token = "<end>"

    def __call__(self, text, add_special_tokens=True, return_tensors=None):
        return {"input_ids": torch.tensor([self.encode(text)])}

    def encode(self, text):
        return [ord(each) for each in text]

    def decode(self, ids, skip_special_tokens=False):
        special = {0: "", 1: "" if skip_special_tokens else "<end>"}
        return "".join(special.get(int(each), chr(int(each))) for each in ids)


# verl


def verl(module):
    try:
        return peer_modules.verl(module)
    except ModuleNotFoundError as error:
        pytest.skip(f"{error.name} is not installed: make test-peers")


@pytest.fixture
def batch():
    """Three samples as verl's rollout leaves them."""
    data_proto = verl("protocol").DataProto
    tokenizer, width = Tokenizer(), 8
    responses = torch.tensor([[*tokenizer.encode(text), 1] + [0] * (width - len(text) - 1) for text in TEXTS])
    prompts = torch.tensor([[ord("p")] * 2] * 3)
    mask = torch.cat([torch.ones_like(prompts), (responses != 0).long()], 1)
    others = {
        "data_source": ["letters"] * 3,
        "reward_model": [{"style": "rule", "ground_truth": truth} for truth in TRUTHS],
        "extra_info": [{"split": "train", "index": row} for row in range(3)],
    }
    return data_proto.from_dict(
        tensors={"prompts": prompts, "responses": responses, "attention_mask": mask},
        non_tensors={key: np.array(value, dtype=object) for key, value in others.items()},
    )


def config(name, **reward_kwargs):
    from omegaconf import OmegaConf

    function = {"path": str(FILE), "name": name, "reward_kwargs": reward_kwargs}
    manager = {"source": "register", "name": "naive"}
    return OmegaConf.create({"reward": {"custom_reward_function": function, "reward_manager": manager}})


def scores_of(manager, batch):
    """(scores, what is logged) from the reward loop, for each sample."""

    async def all_at_once():
        manager.loop = asyncio.get_running_loop()
        return await asyncio.gather(*(manager.run_single(batch[row : row + 1]) for row in range(len(batch))))

    results = asyncio.run(all_at_once())
    return [each["reward_score"] for each in results], [each["reward_extra_info"] for each in results]


def counts():
    return [float(text.count(truth)) for text, truth in zip(TEXTS, TRUTHS, strict=True)]


@pytest.mark.parametrize("name", ["hits_for_verl", "async_hits_for_verl"])
def test_ours_in_verls_reward_loop(batch, name):
    reward = verl("trainer.ppo.reward")
    manager = reward.load_reward_manager(config(name), Tokenizer())
    assert manager.is_async_reward_score == name.startswith("async")
    scores, logged = scores_of(manager, batch)
    assert scores == counts() == [2.0, 2.0, 2.0]
    assert [each["text"] for each in logged] == TEXTS
    assert [each["twice"] for each in logged] == [4.0] * 3 and [each["tenth"] for each in logged] == [0.2] * 3


@pytest.mark.parametrize("name", ["naive", "dapo"])
def test_ours_in_verls_reward_managers(batch, name):
    managers = verl("workers.reward_manager")
    manager = managers.get_reward_manager_cls(name)(Tokenizer(), 0, compute_score=peer_rewards.hits_for_verl)
    result = manager(batch, return_dict=True)
    lengths = torch.tensor([len(text) for text in TEXTS])  # the last token is the end
    expected = torch.zeros(3, 8).scatter(1, lengths[:, None], torch.tensor(counts())[:, None])
    assert torch.equal(result["reward_tensor"], expected)
    assert result["reward_extra_info"]["score"] == counts() and result["reward_extra_info"]["text"] == TEXTS


def test_ours_in_verls_process_pool(batch):
    """Its prime manager pickles the function, and takes numbers only."""
    prime = verl("workers.reward_manager.prime")
    function = to_verl(peer_rewards.plain_hits, column="letter")
    scores = prime.run_reward_scoring(function, TEXTS, TRUTHS, ["letters"] * 3, num_processes=1)
    assert scores == counts()


def ours(reward, batch):
    """As our trainers call it, on the same samples."""
    logged = {}
    result = reward(
        prompts=["pp"] * 3,
        completions=TEXTS,
        completion_ids=[Tokenizer().encode(text) for text in TEXTS],
        trainer_state=None,
        log_extra=logged.__setitem__,
        log_metric=lambda name, value: None,
        **copy.deepcopy({key: list(values) for key, values in batch.non_tensor_batch.items()}),
    )
    return (asyncio.run(result) if inspect.isawaitable(result) else result), logged


@pytest.mark.parametrize("name", ["compute_score", "detailed_score", "async_score", "told"])
def test_theirs_score_the_same_in_our_trainers(batch, name):
    """`told` gives back every argument."""
    found, logged = ours(from_verl(getattr(peer_rewards, name)), batch)
    wanted, entries = scores_of(verl("trainer.ppo.reward").load_reward_manager(config(name), Tokenizer()), batch)
    assert found == wanted
    if name == "compute_score":
        assert logged == {}
    else:
        assert logged == {f"{name}/{key}": [each[key] for each in entries] for key in entries[0] if key != "score"}


def test_verls_reward_kwargs(batch):
    manager = verl("trainer.ppo.reward").load_reward_manager(config("detailed_score", weight=3.0), Tokenizer())
    found, _ = ours(from_verl(peer_rewards.detailed_score, reward_kwargs={"weight": 3.0}), batch)
    assert found == scores_of(manager, batch)[0] == [3 * each for each in counts()]


def test_verls_own_scores():
    """Its default for the data source GSM8K."""
    default = verl("utils.reward_score").default_compute_score
    reward = from_verl(default, column="answer", data_source="openai/gsm8k")
    texts = ["so it is\n#### 42", "#### 41", "42"]
    found = reward(prompts=["q"] * 3, completions=texts, completion_ids=None, answer=["42"] * 3)
    assert found == [1.0, 0.0, 0.0] and reward.__name__ == "default_compute_score"


# OpenRLHF


@pytest.fixture
def agent(openrlhf):
    return openrlhf("utils.agent")


def execute(agent, file, prompt, completion, label, max_length=64):
    """One sample through OpenRLHF's executor, whose engine says `completion`."""

    class Engine:
        async def generate(self, prompt_token_ids, sampling_params, multi_modal_data=None):
            ids = [*Tokenizer().encode(completion), 1]
            return SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids, finish_reason="stop", logprobs=None)])

    executor = agent.SingleTurnAgentExecutor(str(file))
    sampling = SimpleNamespace(max_tokens=16, logprobs=None)
    return asyncio.run(executor.execute(prompt, label, sampling, max_length, Tokenizer(), Engine()))


SOURCE = """
import peer_rewards
from rlkernels.integrations.rewards import to_openrlhf

reward_func = to_openrlhf(peer_rewards.{name}, column="letter", special_tokens=["<end>"])
"""


@pytest.mark.parametrize("name", ["hits", "async_hits", "plain_hits"])
@pytest.mark.parametrize("max_length", [64, 20], ids=["whole prompt", "truncated prompt"])
def test_ours_in_openrlhfs_executor(agent, tmp_path, name, max_length):
    file = tmp_path / "reward.py"
    file.write_text(SOURCE.format(name=name))
    for completion, letter, expected in (("a bad", "a", 2.0), ("<end>b", "e", 0.0)):
        output = execute(agent, file, "a long prompt", completion, letter, max_length)
        assert output["reward"].tolist() == output["scores"].tolist() == [expected]
        logs = {key: value.tolist() for key, value in output["extra_logs"].items()}
        assert logs == (
            {} if name == "plain_hits" else {"twice": [2 * expected], "tenth": [pytest.approx(expected / 10)]}
        )


def test_ours_in_openrlhfs_experience(openrlhf, agent, tmp_path, monkeypatch):
    # Only the names of these modules are needed here.
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=object))
    engine = SimpleNamespace(batch_vllm_engine_call=None)
    monkeypatch.setitem(sys.modules, "openrlhf.trainer.ray.vllm_engine", engine)
    file = tmp_path / "reward.py"
    file.write_text(SOURCE.format(name="hits"))
    response = execute(agent, file, "prompt", "a bad", "a")
    generator = openrlhf("trainer.ppo_utils.samples_generator").SamplesGenerator
    experience = generator._process_response_into_experience(None, response)
    assert experience.rewards.tolist() == experience.scores.tolist() == [2.0]
    assert experience.info["twice"].tolist() == [4.0]


def test_theirs_give_the_same_in_our_trainers(agent, tmp_path):
    file = tmp_path / "reward.py"
    file.write_text("from peer_rewards import reward_func")
    samples = list(zip(["p0", "a p", "b"], TEXTS, TRUTHS, strict=True))
    outputs = [execute(agent, file, *sample) for sample in samples]
    logged = {}
    found = from_openrlhf(peer_rewards.reward_func, column="letter", tokenizer=Tokenizer())(
        prompts=[prompt for prompt, _, _ in samples],
        completions=TEXTS,
        completion_ids=[[*Tokenizer().encode(text), 1] for text in TEXTS],
        letter=TRUTHS,
        log_extra=logged.__setitem__,
    )
    assert found == [output["reward"].item() for output in outputs]
    assert logged["reward_func/scores"] == [output["scores"].item() for output in outputs]
    assert logged["reward_func/length"] == [output["extra_logs"]["length"].item() for output in outputs]


def test_none_does_not_reach_openrlhf(agent, tmp_path):
    file = tmp_path / "reward.py"
    source = "from rlkernels.integrations.rewards import to_openrlhf\nreward_func = to_openrlhf(lambda **_: [None]"
    file.write_text(source + ", default=0.5)")
    assert execute(agent, file, "p", "q", "l")["reward"].tolist() == [0.5]
    assert math.isfinite(to_openrlhf(lambda **_: [None], default=0)(["pq"], ["p"], ["l"])["rewards"])
