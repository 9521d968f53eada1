"""Sampling, padding and what the model is shown. The padding token is the end-of-sequence token throughout."""

import pytest
import torch

from rlkernels.trainers import rollout
from rlkernels.trainers.common import completion_logprobs, completion_logprobs_from_logits, needs_no_logits

CPU = torch.device("cpu")


@pytest.fixture
def sampler():
    return rollout.CompletionSampler(end_token_ids=[0], pad_token_id=0, max_new_tokens=5, temperature=1.0)


def test_pad():
    ids, real = rollout.pad([[1, 0], [2], [3, 4, 0]], "left", 0, CPU)
    assert ids.tolist() == [[0, 1, 0], [0, 0, 2], [3, 4, 0]]
    assert real.tolist() == [[False, True, True], [False, False, True], [True, True, True]]
    ids, real = rollout.pad([[1, 0], [2]], "right", 0, CPU)
    assert ids.tolist() == [[1, 0], [2, 0]]
    assert real.tolist() == [[True, True], [True, False]]


def test_lay_out():
    """Token 0 in a prompt and at the end of a completion is real, where the same token as padding is not."""
    batch = rollout.lay_out([[0, 5], [6]], [[7, 0], [8]], pad_token_id=0, device=CPU)
    assert batch["input_ids"].tolist() == [[0, 5, 7], [0, 6, 8]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 1, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2], [0, 0, 1]]
    assert batch["completion_ids"].tolist() == [[7, 0], [8, -100]]
    assert batch["mask"].tolist() == [[True, True], [True, False]]
    assert batch["num_scored"] == 3


def test_completions_end_at_the_first_end(sampler):
    assert sampler._until_end([5, 0, 0, 0]) == [5, 0]
    assert sampler._until_end([0, 7, 0, 0]) == [0]
    assert sampler._until_end([5, 6, 7, 8]) == [5, 6, 7, 8]


@pytest.fixture(params=["no logits", "logits"])
def model_and_logprobs(request, make_model):
    model = make_model()
    if request.param == "logits":
        return model, completion_logprobs_from_logits
    assert needs_no_logits(model)
    return model, completion_logprobs


def test_log_probabilities_do_not_depend_on_padding(model_and_logprobs):
    model, completion_logprobs = model_and_logprobs
    prompts, completions = [[3, 4, 5, 0, 6], [7]], [[8, 0], [9, 10, 11, 12]]
    together = completion_logprobs(model, rollout.lay_out(prompts, completions, 0, CPU), 0.7)
    for row in range(2):
        alone = rollout.lay_out(prompts[row : row + 1], completions[row : row + 1], 0, CPU)
        logprobs = completion_logprobs(model, alone, 0.7)[0]
        torch.testing.assert_close(together[row, : len(completions[row])], logprobs, rtol=1e-4, atol=1e-5)
    assert (together[0, 2:] == 0).all()


def test_log_probabilities_are_those_of_the_whole_sequence(model_and_logprobs):
    model, completion_logprobs = model_and_logprobs
    prompt, completion = [3, 4, 5], [8, 9, 0]
    logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1] / 0.7
    expected = logits.log_softmax(-1)[range(3), completion]
    actual = completion_logprobs(model, rollout.lay_out([prompt], [completion], 0, CPU), 0.7)[0]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("temperature", [0.8, 8.0], ids=["steep", "flat"])
def test_samples_follow_the_trained_distribution(model_and_logprobs, temperature):
    """Frequencies of the first token against its log-probabilities, in two prompts of different lengths."""
    model, completion_logprobs = model_and_logprobs
    sampler = rollout.CompletionSampler(end_token_ids=[0], pad_token_id=0, max_new_tokens=1, temperature=temperature)
    torch.manual_seed(0)
    count, vocabulary = 4000, model.config.vocab_size
    prompts = [[3, 4, 5, 6], [7]]
    samples = torch.tensor(sampler(model, [prompt for prompt in prompts for _ in range(count)])).view(2, count)
    for prompt, drawn in zip(prompts, samples, strict=True):
        laid_out = rollout.lay_out([prompt] * vocabulary, [[token] for token in range(vocabulary)], 0, CPU)
        with torch.no_grad():
            p = completion_logprobs(model, laid_out, temperature)[:, 0].exp()
        assert p.sum().item() == pytest.approx(1.0, abs=1e-4)
        seen = torch.bincount(drawn, minlength=vocabulary) / count
        # Each frequency is binomial; five standard deviations, and a count of one for the rarest tokens.
        assert ((seen - p).abs() <= 5 * (p / count).sqrt() + 1 / count).all()


def test_sampler_leaves_the_model_as_it_was(make_model, sampler):
    model = make_model()
    config = model.generation_config
    model.train()
    sampler(model, [[3, 4], [5]])
    assert model.training and model.generation_config is config


def test_prompts_read_once_give_the_same_samples(make_model, sampler, monkeypatch):
    model = make_model()
    prompts = [[3, 4, 5, 6]] * 8 + [[7]] * 8 + [[8, 9]] + [[7]]
    shared, alone = [], []
    for samples in (shared, alone):
        torch.manual_seed(0)
        samples += sampler(model, prompts)
        monkeypatch.setattr(rollout.CompletionSampler, "_read_prompts", lambda *args: None)
    assert shared == alone
    assert len(set(map(tuple, shared))) > 8


def test_sampled_lengths(make_model, sampler):
    torch.manual_seed(0)
    completions = sampler(make_model(), [[3, 4], [5]] * 100)
    assert all(1 <= len(ids) <= 5 and 0 not in ids[:-1] for ids in completions)
    assert any(ids[-1] == 0 for ids in completions) and any(ids[-1] != 0 for ids in completions)


def test_encode(tokenizer):
    assert rollout.encode(tokenizer, ["ab", "c"], {}) == [[1, 2], [3]]
    chat = [[{"role": "user", "content": "ab"}]]
    (ids,) = rollout.encode(tokenizer, chat, {})
    assert tokenizer.decode(ids).replace(" ", "") == "u:aba:"
    with pytest.raises(ValueError, match="prompt '' has no tokens"):
        rollout.encode(tokenizer, ["ab", ""], {})


def test_end_tokens(make_model, tokenizer):
    model = make_model()
    assert rollout.end_tokens(model, tokenizer) == [0]
    model.generation_config.eos_token_id = [4, 0]
    assert rollout.end_tokens(model, tokenizer) == [0, 4]
