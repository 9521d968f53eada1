"""Reward functions as users of verl and OpenRLHF write them, and ours for these, in a file that both can load."""

import asyncio
import inspect

import torch

from rlkernels.integrations.rewards import to_openrlhf, to_verl


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return float(solution_str.count(ground_truth))


def detailed_score(data_source, solution_str, ground_truth, extra_info=None, weight=1.0):
    hits = solution_str.count(ground_truth)
    return {"score": weight * hits, "acc": hits > 0, "seen": f"{data_source}:{extra_info.get('split')}"}


async def async_score(data_source, solution_str, ground_truth, extra_info=None):
    await asyncio.sleep(0.01)
    return detailed_score(data_source, solution_str, ground_truth, extra_info)


def told(**arguments):
    return {"score": 1.0, **arguments}


def reward_func(queries, prompts, labels):
    hits = [query[len(prompt) :].count(label) for query, prompt, label in zip(queries, prompts, labels, strict=True)]
    rewards = torch.tensor(hits, dtype=torch.float32)
    lengths = torch.tensor([len(query) for query in queries])
    return {"rewards": rewards, "scores": rewards / 2, "extra_logs": {"length": lengths}}


# Ours


def hits(prompts, completions, completion_ids, letter, log_extra, log_metric, **_):
    found = [float(text.count(wanted)) for text, wanted in zip(completions, letter, strict=True)]
    log_extra("text", list(completions))
    log_extra("twice", [2 * each for each in found])
    log_metric("tenth", found[0] / 10)
    return found


async def async_hits(**kwargs):
    await asyncio.sleep(0.01)
    return hits(**kwargs)


def plain_hits(completions, letter, **_):
    return [float(text.count(wanted)) for text, wanted in zip(completions, letter, strict=True)]


hits_for_verl = to_verl(hits, column="letter")
async_hits_for_verl = to_verl(async_hits, column="letter")
hits_for_openrlhf = to_openrlhf(hits, column="letter")


# A batch, as our trainers give it to a reward function

TEXTS = ["a bad ab", "b", "", "aa"]
BATCH = {
    "prompts": ["p0", "p0", "p1", "p1"],
    "completions": TEXTS,
    "completion_ids": [[1], [2], [3], [4]],
    "letter": ["a", "a", "a", "b"],
}


class Logs:
    def __init__(self):
        self.columns, self.metrics = {}, {}

    @property
    def functions(self):
        return {"log_extra": self.columns.__setitem__, "log_metric": self.metrics.__setitem__}


def call(reward, batch=BATCH, **columns):
    logs = Logs()
    result = reward(**{**batch, **columns}, trainer_state=None, **logs.functions)
    return (asyncio.run(result) if inspect.isawaitable(result) else result), logs
