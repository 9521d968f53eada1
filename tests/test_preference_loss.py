"""Each loss against TRL's own code: the loss functions of its trainers, called on stand-ins for trainer and model that
hold nothing but the log-probabilities."""

import math
import os
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cases import thorough
from rlkernels import preference_loss, reward_pair_loss

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

NAN = float("nan")
INF = float("inf")
DPO_LOSSES = {
    "sigmoid": {},
    "hinge": {},
    "ipo": {},
    "exo_pair": dict(label_smoothing=0.125),
    "nca_pair": {},
    "robust": dict(label_smoothing=0.1),
    "bco_pair": {},
    "sppo_hard": {},
    "aot": dict(label_smoothing=0.1),
    "aot_unpaired": dict(label_smoothing=0.1),
    "apo_zero": {},
    "apo_down": {},
    "discopop": {},
    "sigmoid_norm": {},
    "sft": {},
}
OTHERS = {"simpo": dict(label_smoothing=0.1), "orpo": {}}
PAIRED = DPO_LOSSES | OTHERS
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
WITH_DIVERGENCE = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft")


def pairs(count=7, dtype=torch.float64, spread=2.0, device="cpu", seed=0):
    """Log-probabilities that are minus a few nats a token, and lengths."""
    generator = torch.Generator().manual_seed(seed)
    chosen_lengths, rejected_lengths = (torch.randint(1, 12, (count,), generator=generator) for _ in range(2))
    values = {}
    for name, lengths in (("chosen", chosen_lengths), ("rejected", rejected_lengths)):
        reference = -(0.2 + torch.rand(count, generator=generator)) * lengths
        difference = spread * torch.randn(count, generator=generator)
        values[f"policy_{name}"] = (reference + difference).clamp(max=-0.1)
        values[f"ref_{name}"] = reference
    values = {name: value.to(device, dtype) for name, value in values.items()}
    return {**values, "chosen_lengths": chosen_lengths.to(device), "rejected_lengths": rejected_lengths.to(device)}


def run(function, values, loss, **options):
    """Loss, metrics, and the gradients of both of the policy's log-probabilities."""
    leaves = {name: values[name].clone().requires_grad_() for name in ("policy_chosen", "policy_rejected")}
    value, metrics = function(**(values | leaves), loss=loss, **options)
    assert not metrics.requires_grad
    gradients = torch.autograd.grad(value, tuple(leaves.values()), allow_unused=True)
    zeros = [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(gradients, leaves.values(), strict=True)]
    return value.detach(), metrics, *zeros


class Accelerator:
    device = torch.device("cpu")

    def gather(self, value):
        return value

    gather_for_metrics = gather


def trainer(**attributes):
    """What the loss functions of TRL's trainers ask of `self`."""
    return SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=Accelerator(),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        _metrics={"eval": defaultdict(list)},
        _total_train_tokens=0,
        **attributes,
    )


def spread_over_tokens(logprobs, lengths):
    """[B] log-probabilities over that many tokens each, [B, T], and the mask of these tokens."""
    mask = torch.arange(int(lengths.max())) < lengths.unsqueeze(1)
    return (logprobs / lengths).unsqueeze(1) * mask, mask


def outputs_of_model(per_token):
    def model(**inputs):
        return SimpleNamespace(
            log_probs=per_token,
            entropy=torch.zeros_like(per_token),
            mean_logits=torch.zeros_like(per_token),
            is_top1=torch.ones_like(per_token, dtype=torch.bool),
        )

    return model


def trl_dpo(
    policy_chosen,
    policy_rejected,
    ref_chosen,
    ref_rejected,
    loss,
    beta=0.1,
    chosen_lengths=None,
    rejected_lengths=None,
    label_smoothing=0.0,
    divergence="reverse_kl",
    alpha=0.5,
    discopop_tau=0.05,
):
    trl = pytest.importorskip("trl")
    per_token, mask = spread_over_tokens(
        torch.cat([policy_chosen, policy_rejected]), torch.cat([chosen_lengths, rejected_lengths])
    )
    stand_in = trainer(
        ld_alpha=None,
        f_divergence_type=divergence,
        f_alpha_divergence_coef=alpha,
        loss_types=[loss],
        loss_weights=[1.0],
        beta=beta,
        label_smoothing=label_smoothing,
        use_weighting=False,
        args=SimpleNamespace(discopop_tau=discopop_tau),
    )
    completion_mask = torch.nn.functional.pad(mask.long(), (1, 0))
    inputs = {
        "input_ids": torch.zeros_like(completion_mask),
        "attention_mask": torch.ones_like(completion_mask),
        "completion_mask": completion_mask,
        "ref_chosen_logps": ref_chosen,
        "ref_rejected_logps": ref_rejected,
    }
    value = trl.DPOTrainer._compute_loss(stand_in, outputs_of_model(per_token), inputs, False)
    logged = stand_in._metrics["eval"]
    names = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen")
    return value, torch.tensor([logged[name][0] for name in (*names, "logps/rejected")])


def trl_pairs(trainer_class, own_loss, policy_chosen, policy_rejected, chosen_lengths, rejected_lengths, **options):
    """TRL's CPO or ORPO trainer, whose model's log-probabilities are averages over tokens."""
    nll = -policy_chosen.sum() / chosen_lengths.sum()
    logprobs = policy_chosen / chosen_lengths, policy_rejected / rejected_lengths
    logits = torch.zeros(1), torch.zeros(1)
    stand_in = trainer(concatenated_forward=lambda model, batch: (*logprobs, *logits, nll), **options)
    setattr(stand_in, own_loss, getattr(trainer_class, own_loss).__get__(stand_in))
    value, logged = trainer_class.get_batch_loss_metrics(stand_in, None, None, "train")
    names = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")
    return value, torch.tensor([float(logged[name]) for name in names])


def trl_simpo(loss, ref_chosen, ref_rejected, beta=0.1, label_smoothing=0.0, simpo_gamma=0.5, **values):
    cpo = pytest.importorskip("trl.experimental.cpo")
    options = dict(loss_type="simpo", beta=beta, label_smoothing=label_smoothing, simpo_gamma=simpo_gamma)
    return trl_pairs(cpo.CPOTrainer, "cpo_loss", **values, **options, alpha=0.0, cpo_alpha=0.0)


def trl_orpo(loss, ref_chosen, ref_rejected, beta=0.1, **values):
    orpo = pytest.importorskip("trl.experimental.orpo")
    return trl_pairs(orpo.ORPOTrainer, "odds_ratio_loss", **values, beta=beta)


def assert_equals_trl(values, loss, tolerance, **options):
    theirs = {"simpo": trl_simpo, "orpo": trl_orpo}.get(loss, trl_dpo)
    got, wanted = (run(function, values, loss, **options) for function in (preference_loss, theirs))
    torch.testing.assert_close(got[0], wanted[0].to(got[0].dtype), **tolerance)
    torch.testing.assert_close(got[1][: len(wanted[1])].float(), wanted[1].float(), rtol=1e-5, atol=1e-6)
    for one, other in zip(got[2:], wanted[2:], strict=True):
        torch.testing.assert_close(one, other, **tolerance)
        assert one.any() or not other.any()
    return got


# exo_pair's label smoothing and orpo's log-probabilities are float32 in TRL whatever the inputs are.
IN_FLOAT32 = ("exo_pair", "orpo")


@pytest.mark.parametrize("loss", PAIRED)
@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_equals_trl(loss, beta):
    tolerance = dict(rtol=1e-5, atol=1e-6) if loss in IN_FLOAT32 else dict(rtol=1e-12, atol=1e-13)
    assert_equals_trl(pairs(), loss, tolerance, beta=beta, **PAIRED[loss])
    assert_equals_trl(pairs(count=1, seed=1), loss, tolerance, beta=beta, **PAIRED[loss])


@pytest.mark.parametrize("loss", WITH_DIVERGENCE)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.5])
def test_divergences_equal_trl(loss, divergence, alpha):
    # TRL's alpha divergence knows no float64.
    exact = divergence != "alpha_divergence" and loss not in IN_FLOAT32
    tolerance = dict(rtol=1e-11, atol=1e-12) if exact else dict(rtol=2e-5, atol=2e-6)
    values = pairs(dtype=torch.float64 if exact else torch.float32)
    assert_equals_trl(values, loss, tolerance, divergence=divergence, alpha=alpha, **DPO_LOSSES[loss])


@pytest.mark.parametrize("options", [dict(discopop_tau=0.5), dict(discopop_tau=2.0)], ids=str)
def test_discopop_tau_equals_trl(options):
    assert_equals_trl(pairs(), "discopop", dict(rtol=1e-12, atol=1e-13), **options)


def test_simpo_gamma_equals_trl():
    assert_equals_trl(pairs(), "simpo", dict(rtol=1e-12, atol=1e-13), beta=2.0, simpo_gamma=1.3)


def trl_kto(policy, reference, labels, kl, beta, desirable_weight, undesirable_weight, loss_type="kto"):
    """kl is the mean log-ratio of the sequences that TRL measures it on; here there is one of them."""
    trl = pytest.importorskip("trl")
    stand_in = trainer(
        calculate_KL=True,
        loss_type=loss_type,
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
        _compute_kl_logps=lambda model, batch: torch.tensor([kl], dtype=policy.dtype),
    )
    mask = torch.tensor([[0, 1]]).expand(len(policy), 2)
    batch = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "label": labels,
        "ref_logps": reference,
        "ref_KL_logps": torch.zeros(1, dtype=policy.dtype),
    }
    value = trl.KTOTrainer._compute_loss(stand_in, outputs_of_model(policy.unsqueeze(1)), batch, False)
    return value, stand_in._metrics["eval"]


@pytest.mark.parametrize("kl", [0.3, -0.3])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 0.4), (2.0, 0.0)])
@pytest.mark.parametrize("kinds", ["both", "desirable", "undesirable"])
def test_kto_equals_trl(kl, weights, kinds):
    values = pairs(9)
    labels = torch.tensor([True, False, False] * 3)
    labels = {"both": labels, "desirable": labels | True, "undesirable": labels & False}[kinds]
    options = dict(zip(("desirable_weight", "undesirable_weight"), weights, strict=True))
    leaf = values["policy_chosen"].requires_grad_()
    wanted, logged = trl_kto(leaf, values["ref_chosen"], labels, kl, 0.5, **options)
    (wanted_gradient,) = torch.autograd.grad(wanted, leaf)
    for one_kl in (kl, torch.tensor(kl, dtype=torch.float64)):
        loss, metrics = preference_loss(
            leaf, None, values["ref_chosen"], loss="kto", beta=0.5, labels=labels, kl=one_kl, **options
        )
        torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=0)
        torch.testing.assert_close(torch.autograd.grad(loss, leaf)[0], wanted_gradient, rtol=1e-12, atol=0)
    assert not metrics.requires_grad
    named = dict(zip(preference_loss.metrics, metrics.tolist(), strict=True))
    for ours, theirs in (
        ("rewards_chosen", "rewards/chosen"),
        ("rewards_rejected", "rewards/rejected"),
        ("margin", "rewards/margins"),
        ("logprobs_chosen", "logps/chosen"),
        ("logprobs_rejected", "logps/rejected"),
    ):
        if theirs in logged:
            torch.testing.assert_close(named[ours], logged[theirs][0], rtol=1e-6, atol=0)
    assert named["accuracy"] == 0.0
    assert ("rewards/margins" in logged) == (kinds == "both")


def test_kto_without_kl_is_apo_zero_unpaired():
    values, labels = pairs(9), torch.tensor([True, False, False] * 3)
    wanted, _ = trl_kto(
        values["policy_chosen"], values["ref_chosen"], labels, 0.7, 0.5, 1.0, 1.0, loss_type="apo_zero_unpaired"
    )
    got, _ = preference_loss(
        values["policy_chosen"], None, values["ref_chosen"], loss="kto", beta=0.5, labels=labels.int(), kl=0.0
    )
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=0)


def test_smoothed_sigmoid_is_the_expected_loss_of_labels_that_may_be_wrong():
    values = pairs()
    swapped = {
        name.replace("chosen", "x").replace("rejected", "chosen").replace("x", "rejected"): v
        for name, v in values.items()
    }
    right, wrong = (preference_loss(**v)[0] for v in (values, swapped))
    smoothed, _ = preference_loss(**values, label_smoothing=0.2)
    torch.testing.assert_close(smoothed, 0.8 * right + 0.2 * wrong, rtol=1e-12, atol=0)


@pytest.mark.parametrize("margin", [None, True])
def test_reward_pair_loss_equals_trl(margin):
    trl = pytest.importorskip("trl")
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(14, generator=generator, dtype=torch.float64).requires_grad_()
    inputs = {"attention_mask": torch.ones(14, 1)}
    if margin:
        margin = torch.rand(7, generator=generator, dtype=torch.float64)

    def model(**kwargs):
        return SimpleNamespace(logits=scores.unsqueeze(1))

    stand_in = trainer(args=SimpleNamespace(center_rewards_coefficient=None))
    with_margin = inputs if margin is None else inputs | {"margin": margin}
    wanted = trl.RewardTrainer.compute_loss(stand_in, model, with_margin)
    loss, metrics = reward_pair_loss(*scores.chunk(2), margin)
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=0)
    gradients = (torch.autograd.grad(value, scores)[0] for value in (loss, wanted))
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=0)
    assert not metrics.requires_grad
    logged = [stand_in._metrics["eval"][name][0] for name in reward_pair_loss.metrics]
    torch.testing.assert_close(metrics.float(), torch.tensor(logged), rtol=1e-6, atol=0)


@pytest.mark.parametrize("loss", [*PAIRED, "kto"])
def test_gradcheck(loss):
    values = pairs(5)
    chosen, rejected = (values.pop(name).requires_grad_() for name in ("policy_chosen", "policy_rejected"))
    for divergence in DIVERGENCES if loss in WITH_DIVERGENCE else DIVERGENCES[:1]:
        options = PAIRED.get(loss, {}) | dict(loss=loss, divergence=divergence, beta=0.6)

        def of_pairs(chosen, rejected, options=options):
            return preference_loss(chosen, rejected, **values, **options)[0]

        def of_completions(chosen, options=options):
            options = options | dict(labels=torch.tensor([1, 0, 1, 0, 0]), kl=0.1)
            return preference_loss(chosen, None, values["ref_chosen"], **options)[0]

        if loss == "kto":
            assert torch.autograd.gradcheck(of_completions, chosen)
        else:
            assert torch.autograd.gradcheck(of_pairs, (chosen, rejected))


EXTREMES = torch.tensor([0.0, 1.0, -1.0, 30.0, -30.0, 90.0, -90.0, 1e4, -1e4])


@pytest.mark.parametrize("loss", [*PAIRED, "kto"])
@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_values_and_gradients_stay_finite(loss, beta):
    """Log-ratios and, at beta 1, logits of up to 1e4 and 2e4, of either sign, in every combination."""
    chosen, rejected = (value.flatten() for value in torch.meshgrid(EXTREMES, EXTREMES, indexing="ij"))
    zero, one = torch.zeros_like(chosen), torch.ones_like(chosen)
    for divergence in DIVERGENCES if loss in WITH_DIVERGENCE else DIVERGENCES[:1]:
        if loss == "ipo" and divergence in ("forward_kl", "alpha_divergence"):
            continue  # the square of exp(80)
        options = PAIRED.get(loss, {}) | dict(loss=loss, divergence=divergence, beta=beta)
        leaves = chosen.clone().requires_grad_(), rejected.clone().requires_grad_()
        if loss == "kto":
            value, metrics = preference_loss(leaves[0], None, zero, **options, labels=rejected > 0, kl=0.1)
            leaves = leaves[:1]
        else:
            value, metrics = preference_loss(*leaves, zero, zero, **options, chosen_lengths=one, rejected_lengths=one)
        assert value.isfinite()
        assert metrics.isfinite().all()
        for gradient in torch.autograd.grad(value, leaves, allow_unused=True):
            assert gradient is None or gradient.isfinite().all()


@pytest.mark.parametrize("logprob", [0.0, -1e-38, -1e-8, -1e-3, math.log(0.5), -0.8, -20.0, -1e4])
def test_orpo_at_the_ends_of_probability(logprob):
    """Near 1 the odds overflow, near 0 the odds are the probability; TRL's gradients are NaN at the first."""
    other = torch.tensor([-1.0])
    for chosen, rejected in ((torch.tensor([logprob]), other), (other, torch.tensor([logprob]))):
        leaves = chosen.requires_grad_(), rejected.requires_grad_()
        value, _ = preference_loss(*leaves, loss="orpo", chosen_lengths=torch.ones(1), rejected_lengths=torch.ones(1))
        gradients = torch.autograd.grad(value, leaves)
        assert value.isfinite()
        assert all(gradient.isfinite().all() for gradient in gradients)
        if -1e4 <= logprob <= -1e-8:
            p, q = (leaf.detach().double().expm1() for leaf in leaves)  # minus the complements
            odds = (leaves[0].detach().double() - (-p).log()) - (leaves[1].detach().double() - (-q).log())
            wanted = -leaves[0].detach().double() - 0.1 * torch.nn.functional.logsigmoid(odds)
            torch.testing.assert_close(value.detach().double(), wanted.squeeze(), rtol=1e-6, atol=1e-6)
        chosen.requires_grad_(False), rejected.requires_grad_(False)


def test_far_logits_by_hand():
    """Where sigmoid rounds to 0 or 1: the loss is linear on one side, 0 on the other, and so is its gradient."""
    chosen = torch.tensor([-1e4, 1e4], requires_grad=True)
    zero = torch.zeros(2)
    for loss, wanted in (("sigmoid", 5000.0), ("bco_pair", 5000.0 + math.log(2)), ("discopop", 5000.0)):
        value, _ = preference_loss(chosen, zero, zero, zero, loss=loss, beta=1.0)
        torch.testing.assert_close(value.item(), wanted, rtol=1e-6, atol=0)
        torch.testing.assert_close(torch.autograd.grad(value, chosen)[0], torch.tensor([-0.5, 0.0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("loss", PAIRED)
def test_dtypes(loss, dtype):
    """Halves are widened: the loss is that of their values in float32."""
    values = {name: v.to(dtype) if v.is_floating_point() else v for name, v in pairs().items()}
    got = run(preference_loss, values, loss, **PAIRED[loss])
    work = torch.float64 if dtype == torch.float64 else torch.float32
    assert got[0].dtype == got[1].dtype == work
    assert got[2].dtype == got[3].dtype == dtype
    wide = {name: v.to(work) if v.is_floating_point() else v for name, v in values.items()}
    wanted = run(preference_loss, wide, loss, **PAIRED[loss])
    assert torch.equal(got[0], wanted[0])
    assert torch.equal(got[2], wanted[2].to(dtype))
    in_double = run(preference_loss, {name: v.double() for name, v in values.items()}, loss, **PAIRED[loss])
    torch.testing.assert_close(got[0].double(), in_double[0], rtol=1e-5, atol=1e-6)


def test_metrics_by_hand():
    values = dict(
        policy_chosen=torch.tensor([-1.0, -2.0]),
        policy_rejected=torch.tensor([-3.0, -1.0]),
        ref_chosen=torch.tensor([-2.0, -2.0]),
        ref_rejected=torch.tensor([-2.0, -2.0]),
    )
    _, metrics = preference_loss(**values, beta=0.5)
    assert dict(zip(preference_loss.metrics, metrics.tolist(), strict=True)) == dict(
        rewards_chosen=0.25,
        rewards_rejected=0.0,
        accuracy=0.5,
        margin=0.25,
        logprobs_chosen=-1.5,
        logprobs_rejected=-2.0,
    )
    lengths = dict(chosen_lengths=torch.tensor([2, 4]), rejected_lengths=torch.tensor([3, 0]))
    without = {name: value for name, value in values.items() if name.startswith("policy")}
    _, metrics = preference_loss(**without, **lengths, beta=0.5, loss="sft")
    assert metrics[:2].tolist() == [-0.75, -1.0]
    for reference in ({}, {name: value for name, value in values.items() if name.startswith("ref")}):
        loss, metrics = preference_loss(**without, **reference, **lengths, beta=0.5, loss="simpo")
        assert metrics[:2].tolist() == [-0.25, -0.5]
        assert loss == preference_loss(**without, **lengths, beta=0.5, loss="simpo")[0]


@pytest.mark.parametrize("name", ["chosen_lengths", "rejected_lengths"])
def test_lengths_of_zero_count_as_one(name):
    zero, one = (pairs(3) | {name: torch.tensor([2, length, 3])} for length in (0, 1))
    for loss in ("ipo", "sigmoid_norm", "simpo"):
        assert torch.equal(preference_loss(**zero, loss=loss)[0], preference_loss(**one, loss=loss)[0])


@pytest.mark.parametrize("loss", [*PAIRED, "kto"])
def test_empty_batch(loss):
    values = {name: value[:0] for name, value in pairs().items()}
    leaf = values["policy_chosen"].requires_grad_()
    options = PAIRED.get(loss, {})
    if loss == "kto":
        nothing = torch.zeros(0, dtype=torch.bool)
        value, metrics = preference_loss(leaf, None, values["ref_chosen"], loss=loss, labels=nothing, kl=0.0)
    else:
        value, metrics = preference_loss(**values, loss=loss, **options)
    assert value == 0.0
    assert not metrics.any()
    assert torch.autograd.grad(value, leaf)[0].shape == (0,)
    loss, metrics = reward_pair_loss(leaf, leaf)
    assert loss == 0.0
    assert not metrics.any()


@pytest.mark.parametrize("loss", [*PAIRED, "kto"])
def test_nothing_waits_for_the_device(loss):
    """On fake tensors, which have no values: looking at one raises."""
    with FakeTensorMode():
        chosen, rejected = (torch.zeros(5).requires_grad_() for _ in range(2))
        reference, lengths = torch.zeros(5), torch.ones(5, dtype=torch.int64)
        if loss == "kto":
            value, _ = preference_loss(chosen, None, reference, loss=loss, labels=lengths, kl=torch.zeros(()))
        else:
            lengths = dict(chosen_lengths=lengths, rejected_lengths=lengths)
            value, _ = preference_loss(chosen, rejected, reference, reference, loss=loss, **lengths, **PAIRED[loss])
        value.backward()
        reward_pair_loss(chosen, rejected, reference)[0].backward()


# The losses whose code differs most: one term, several, a sort, weights, labels.
COMPILED = ("sigmoid", "robust", "aot", "discopop", "kto")


@pytest.mark.parametrize("loss", [loss if loss in COMPILED else thorough(loss) for loss in (*PAIRED, "kto")])
def test_compile(loss):
    torch._dynamo.reset()
    values = pairs(dtype=torch.float32)
    options = PAIRED.get(loss, {})
    if loss == "kto":
        values = {name: values[name] for name in ("policy_chosen", "ref_chosen")} | {"policy_rejected": None}
        options = dict(labels=torch.tensor([1, 0, 1, 0, 0, 1, 1]), kl=0.1)

    def function(policy_chosen, **others):
        loss_, metrics = preference_loss(2 * policy_chosen, **others, loss=loss, **options)
        return loss_ + reward_pair_loss(policy_chosen, others["ref_chosen"])[0], metrics

    leaf = values.pop("policy_chosen").requires_grad_()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    (one, metrics), (other, wanted) = (f(leaf, **values) for f in (compiled, function))
    torch.testing.assert_close(one, other)
    torch.testing.assert_close(metrics, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(value, leaf)[0] for value in (one, other)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: none of the tests of this file ran on one")
def test_on_a_gpu():
    for loss, options in PAIRED.items():
        got, wanted = (run(preference_loss, pairs(device=device), loss, **options) for device in ("cuda", "cpu"))
        for one, other in zip(got, wanted, strict=True):
            torch.testing.assert_close(one.cpu(), other)


THREE = torch.full((3,), -1.0)
LENGTHS = dict(chosen_lengths=torch.ones(3), rejected_lengths=torch.ones(3))
KTO = dict(loss="kto", policy_rejected=None, ref_rejected=None, labels=torch.ones(3), kl=0.0)
GRADIENT = THREE.clone().requires_grad_()
BAD_INPUT = {
    "loss": (dict(loss="dpo"), ValueError, ("loss", "sigmoid", "hinge", "sft", "simpo", "orpo", "kto", "'dpo'")),
    "loss None": (dict(loss=None), ValueError, ("loss", "sigmoid_norm", "None")),
    "divergence": (dict(divergence="kl"), ValueError, ("divergence", *DIVERGENCES, "'kl'")),
    "divergence with nca_pair": (
        dict(loss="nca_pair", divergence="forward_kl"),
        ValueError,
        ("divergence", "reverse_kl", "nca_pair", "sigmoid_norm", "forward_kl"),
    ),
    "divergence with simpo": (
        dict(loss="simpo", divergence="js_divergence", **LENGTHS),
        ValueError,
        ("divergence", "simpo", "js_divergence"),
    ),
    "beta 0": (dict(beta=0), ValueError, ("beta", "> 0", "0")),
    "beta None": (dict(beta=None), TypeError, ("beta", "number", "NoneType")),
    "alpha nan": (dict(alpha=NAN), ValueError, ("alpha", "finite", "nan")),
    "discopop_tau 0": (dict(discopop_tau=0.0), ValueError, ("discopop_tau", "> 0")),
    "simpo_gamma inf": (dict(simpo_gamma=INF), ValueError, ("simpo_gamma", "finite", "inf")),
    "label_smoothing negative": (dict(label_smoothing=-0.1), ValueError, ("label_smoothing", ">= 0", "-0.1")),
    "label_smoothing 1": (dict(label_smoothing=1.0), ValueError, ("label_smoothing", "< 1", "1.0")),
    "label_smoothing with hinge": (
        dict(loss="hinge", label_smoothing=0.1),
        ValueError,
        ("label_smoothing", "hinge", "robust", "0.1"),
    ),
    "exo_pair without label_smoothing": (dict(loss="exo_pair"), ValueError, ("label_smoothing", "exo_pair", "> 0")),
    "robust half smoothed": (
        dict(loss="robust", label_smoothing=0.5),
        ValueError,
        ("label_smoothing", "robust", "< 0.5", "0.5"),
    ),
    "policy_chosen a list": (dict(policy_chosen=[0.0]), TypeError, ("policy_chosen", "list")),
    "policy_chosen integer": (dict(policy_chosen=THREE.long()), TypeError, ("policy_chosen", "float32", "int64")),
    "policy_chosen 2-d": (dict(policy_chosen=torch.zeros(3, 1)), ValueError, ("policy_chosen", "[B]", "[3, 1]")),
    "policy_rejected None": (dict(policy_rejected=None), TypeError, ("policy_rejected", "NoneType")),
    "policy_rejected shape": (dict(policy_rejected=torch.zeros(2)), ValueError, ("policy_rejected", "[3]", "[2]")),
    "policy_rejected device": (
        dict(policy_rejected=torch.zeros(3, device="meta")),
        ValueError,
        ("policy_rejected", "cpu", "meta"),
    ),
    "ref_chosen shape": (dict(ref_chosen=torch.zeros(1)), ValueError, ("ref_chosen", "[3]", "[1]")),
    "ref_chosen gradient": (dict(ref_chosen=GRADIENT), ValueError, ("ref_chosen", "detach")),
    "ref_rejected gradient": (dict(ref_rejected=GRADIENT), ValueError, ("ref_rejected", "detach")),
    "ref_rejected integer": (dict(ref_rejected=THREE.long()), TypeError, ("ref_rejected", "float32", "int64")),
    "chosen_lengths shape": (
        dict(loss="ipo", **(LENGTHS | dict(chosen_lengths=torch.ones(2)))),
        ValueError,
        ("chosen_lengths", "[3]", "[2]"),
    ),
    "rejected_lengths a list": (
        dict(loss="ipo", **(LENGTHS | dict(rejected_lengths=[1, 2, 3]))),
        TypeError,
        ("rejected_lengths", "list"),
    ),
    "labels with sigmoid": (dict(labels=torch.ones(3)), ValueError, ("labels", "sigmoid", "kto")),
    "kl with sigmoid": (dict(kl=0.0), ValueError, ("kl", "sigmoid", "kto")),
    "kto with pairs": (KTO | dict(policy_rejected=THREE), ValueError, ("policy_rejected", "None", "kto")),
    "kto with a reference of the rejected": (KTO | dict(ref_rejected=THREE), ValueError, ("ref_rejected", "kto")),
    "kto without labels": (KTO | dict(labels=None), ValueError, ("labels", "kto", "None")),
    "kto without kl": (KTO | dict(kl=None), ValueError, ("kl", "kto", "None")),
    "kto labels shape": (KTO | dict(labels=torch.ones(2)), ValueError, ("labels", "[3]", "[2]")),
    "kto kl a vector": (KTO | dict(kl=torch.ones(1)), ValueError, ("kl", "0-d", "[1]")),
    "kto kl nan": (KTO | dict(kl=NAN), ValueError, ("kl", "finite", "nan")),
    "kto kl gradient": (KTO | dict(kl=torch.zeros((), requires_grad=True)), ValueError, ("kl", "detach")),
    "kto weight": (KTO | dict(desirable_weight=-1.0), ValueError, ("desirable_weight", ">= 0", "-1")),
}
for loss in ("ipo", "sigmoid_norm", "sft", "simpo", "orpo"):
    for name in LENGTHS:
        lengths = LENGTHS | {name: None}
        BAD_INPUT[f"{loss} without {name}"] = (dict(loss=loss, **lengths), ValueError, (name, loss, "None"))
for loss in (*DPO_LOSSES, "kto"):
    for name in ("ref_chosen", "ref_rejected"):
        if loss != "sft" and (loss, name) != ("kto", "ref_rejected"):
            options = (KTO if loss == "kto" else dict(loss=loss, **LENGTHS, **DPO_LOSSES[loss])) | {name: None}
            BAD_INPUT[f"{loss} without {name}"] = (options, ValueError, (name, loss, "sft, simpo, orpo"))


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input(name):
    changes, error, fragments = BAD_INPUT[name]
    arguments = dict.fromkeys(("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected"), THREE)
    with pytest.raises(error) as raised:
        preference_loss(**(arguments | changes))
    for fragment in fragments:
        assert fragment in str(raised.value)


BAD_REWARDS = {
    "chosen 2-d": (dict(chosen=torch.zeros(3, 1)), ValueError, ("chosen", "[B]", "[3, 1]")),
    "chosen integer": (dict(chosen=THREE.long()), TypeError, ("chosen", "float32", "int64")),
    "rejected shape": (dict(rejected=torch.zeros(1)), ValueError, ("rejected", "[3]", "[1]")),
    "rejected device": (dict(rejected=torch.zeros(3, device="meta")), ValueError, ("rejected", "cpu", "meta")),
    "margin a number": (dict(margin=0.5), TypeError, ("margin", "float")),
    "margin shape": (dict(margin=torch.zeros(())), ValueError, ("margin", "[3]", "[]")),
    "margin gradient": (dict(margin=GRADIENT), ValueError, ("margin", "detach")),
}


@pytest.mark.parametrize("name", BAD_REWARDS)
def test_bad_reward_input(name):
    changes, error, fragments = BAD_REWARDS[name]
    with pytest.raises(error) as raised:
        reward_pair_loss(**({"chosen": THREE, "rejected": THREE} | changes))
    for fragment in fragments:
        assert fragment in str(raised.value)
