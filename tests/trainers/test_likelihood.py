"""The losses of SFTTrainer against their equations in plain code."""

from dataclasses import replace

import pytest
import torch

from rlkernels.trainers.batch import scoring
from rlkernels.trainers.batch.batch import Batch, Sequence
from rlkernels.trainers.losses import likelihood

ROWS = [Sequence([5, 6, 7, 8, 0], [-100, -100, 7, 8, 0]), Sequence([9, 10, 11], [-100, 10, 11])]
WEIGHTS = {"nll": lambda logprobs: torch.ones_like(logprobs), "dft": lambda logprobs: logprobs.exp()}


def gradient(model, loss) -> torch.Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("return_accuracy", [False, True], ids=["loss", "with accuracy"])
@pytest.mark.parametrize("fused", [True, False], ids=["no logits", "logits"])
@pytest.mark.parametrize("loss_type", likelihood.LOSSES)
def test_equation(make_model, loss_type, fused, return_accuracy):
    """The step has 11 tokens, and this micro-batch five of them: the loss is its share."""
    model = make_model()
    assert not fused or scoring.needs_no_logits(model)
    batch = replace(Batch.lay_out(ROWS, torch.device("cpu"), padding_free=False), normalizer=11.0)
    loss, metrics = likelihood.LOSSES[loss_type](model, batch, fused=fused, return_accuracy=return_accuracy)
    found = gradient(model, loss)

    plain = make_model().double()
    logits = torch.cat([plain(torch.tensor([row.input_ids])).logits[0, :-1] for row in ROWS]).log_softmax(-1)
    labels = torch.tensor([label for row in ROWS for label in row.labels[1:]])
    logits, labels = logits[labels != -100], labels[labels != -100]
    logprobs = logits.gather(1, labels[:, None]).squeeze(1)
    expected = -(WEIGHTS[loss_type](logprobs.detach()) * logprobs).sum() / 11.0
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.double(), gradient(plain, expected), rtol=1e-4, atol=1e-6)
    means = {"entropy": -(logits.exp() * logits).sum(-1).mean()}
    if return_accuracy:
        means["mean_token_accuracy"] = (logits.argmax(-1) == labels).double().mean()
    assert metrics.keys() == means.keys()
    for name, mean in means.items():
        torch.testing.assert_close(metrics[name].double(), mean, rtol=1e-5, atol=1e-6)
