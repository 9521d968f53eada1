"""Proximal policy optimization (arXiv 1707.06347) of a language model, as in InstructGPT (arXiv 2203.02155): per-token
rewards with a KL penalty, a learned value function, generalised advantages, clipped policy and value losses."""

import copy
import math
import random
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

import rlkernels

from .base.trainer import BaseTrainer
from .batch import scoring
from .batch.batch import IGNORE, Batch, Sequence
from .rollouts.collector import Collector, reward_functions
from .rollouts.config import OnlineConfig, RewardSource
from .rollouts.engine import Engine
from .value import PolicyAndValue, load_value_model


@dataclass(repr=False)
class PPOConfig(OnlineConfig):
    """Options of `PPOTrainer`. Each process samples completions of `per_device_train_batch_size` x
    `gradient_accumulation_steps` prompts at a time and takes `num_ppo_epochs` x `num_mini_batches` optimizer steps on
    them. Names and defaults are those of TRL 1.8.0, the last version with a PPO trainer."""

    learning_rate: float = field(default=3e-6, metadata={"help": "The initial learning rate of AdamW."})
    temperature: float = field(
        default=0.7, metadata={"help": "Temperature of sampling, and of the log-probabilities in the loss."}
    )
    max_completion_length: int = field(
        init=False, metadata={"help": "Equal to response_length; this is its name in GRPO."}
    )
    response_length: int = field(default=53, metadata={"help": "Longest completion in tokens."})
    total_episodes: int | None = field(
        default=None,
        metadata={"help": "Completions to learn from, over all processes. Replaces num_train_epochs and max_steps."},
    )
    num_ppo_epochs: int = field(default=4, metadata={"help": "Passes over the completions that were sampled together."})
    num_mini_batches: int = field(
        default=1,
        metadata={"help": "Optimizer steps in a pass. The completions are split at random into as many parts."},
    )

    missing_eos_penalty: float | None = field(
        default=None, metadata={"help": "Subtracted from the score of a completion without an end token."}
    )
    score_at: str = field(
        default="last",
        metadata={
            "help": "Where a completion's score is given. last: at its last token. after_last: after it, as in TRL, in "
            "a state with its own value; at the last token if the completion has response_length tokens.",
            "choices": ["last", "after_last"],
        },
    )
    whiten_rewards: bool = field(
        default=False, metadata={"help": "Divide token rewards by their standard deviation over the batch."}
    )
    kl_coef: float = field(
        default=0.05,
        metadata={"help": "Coefficient of the KL penalty to the initial model. With 0 no reference model is kept."},
    )
    kl_estimator: str = field(
        default="k1",
        metadata={
            "help": "Estimator of the divergence at a token: k1, k2, k3 or abs, as in `kl_penalty`.",
            "choices": ["k1", "k2", "k3", "abs"],
        },
    )
    adap_kl_ctrl: bool = field(
        default=False,
        metadata={"help": "Adapt the KL coefficient, starting at kl_coef, so that objective/kl nears target_kl."},
    )
    target_kl: float = field(default=6.0, metadata={"help": "The KL per completion that adap_kl_ctrl aims at."})
    horizon: float = field(
        default=10000,
        metadata={"help": "Completions in which adap_kl_ctrl changes the coefficient by at most a fifth."},
    )

    cliprange: float = field(default=0.2, metadata={"help": "The importance ratio is clipped at 1 +- cliprange."})
    vf_coef: float = field(default=0.1, metadata={"help": "Coefficient of the value loss."})
    cliprange_value: float = field(
        default=0.2, metadata={"help": "Values are clipped at the values of sampling time +- cliprange_value."}
    )
    gamma: float = field(default=1.0, metadata={"help": "Discount per token."})
    lam: float = field(default=0.95, metadata={"help": "Lambda of generalized advantage estimation."})

    def __post_init__(self) -> None:
        self.max_completion_length = self.response_length
        super().__post_init__()
        if self.adap_kl_ctrl and self.kl_coef == 0:
            raise ValueError("adap_kl_ctrl needs a kl_coef above 0 to start from; got 0")
        rows = self.per_device_train_batch_size * self.gradient_accumulation_steps
        if rows % self.num_mini_batches:
            raise ValueError(
                f"the {rows} completions of a process (per_device_train_batch_size {self.per_device_train_batch_size} "
                f"x gradient_accumulation_steps {self.gradient_accumulation_steps}) must be divisible by "
                f"num_mini_batches ({self.num_mini_batches})"
            )
        if self.total_episodes is not None:
            batches = math.ceil(self.total_episodes / self.rollout_batch_size)
            self.max_steps = batches * self.num_ppo_epochs * self.num_mini_batches

    @property
    def rollout_batch_size(self) -> int:
        """The number of prompts in one batch of completions, over all processes."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size


# A file and a folder of each checkpoint.
KL_COEF, VALUE = "kl_coef.json", "value"


@dataclass
class Experience:
    """What the optimizer steps on one batch of prompts learn from, on this process. Lists have an entry per row; values
    per token are those of its branch, shifted, as in `Batch`."""

    sequences: list[Sequence]
    order: list[list[int]]  # the order of the rows in each pass over them
    old_logprobs: list[Tensor]
    old_values: list[Tensor]
    advantages: list[Tensor]
    returns: list[Tensor]
    has_value: list[Tensor]  # bool: the tokens in the loss, and the place of the score
    sampler_logprobs: list[Tensor] | None = None  # None: they are not corrected for
    forward_pass: list[list[Tensor]] | None = None  # as in `PPOBatch`, until the first step has taken it


PER_TOKEN = ("old_logprobs", "old_values", "advantages", "returns", "has_value", "sampler_logprobs")


@dataclass(frozen=True, kw_only=True, eq=False)
class PPOBatch(Batch):
    """Completions of the rollout, with what their losses take. Tensors have shape [N]:

    old_logprobs       float32: the log-probabilities under the policy of the rollout
    old_values         float32: the values of the rollout
    advantages         float32
    returns            float32: what the values learn
    has_value          bool: where a value is learned, in the places of `mask` and where the score is given
    sampler_logprobs   float32: the engine's log-probabilities; None if they are not corrected for

    forward_pass       log-probabilities, values and entropy, float32, with the graph of the pass that scored the rows;
                       None: the step runs the model itself
    value_normalizer   what the sum of the step's value losses is divided by, a 0-d tensor
    """

    old_logprobs: Tensor
    old_values: Tensor
    advantages: Tensor
    returns: Tensor
    has_value: Tensor
    sampler_logprobs: Tensor | None = None
    forward_pass: list[Tensor] | None = None
    value_normalizer: float | Tensor = 1.0


class AdaptiveKL:
    """The coefficient of the KL penalty. With adap_kl_ctrl it moves to where the policy keeps `target_kl`:

        coef *= 1 + clip(kl / target_kl - 1, -0.2, 0.2) * completions / horizon

    References: Ziegler et al. 2019 (arXiv 1909.08593, section 2.2).
    """

    def __init__(self, args: PPOConfig) -> None:
        self.args, self.coef = args, args.kl_coef

    def update(self, kl: float, completions: float) -> None:
        if self.args.adap_kl_ctrl:
            error = min(max(kl / self.args.target_kl - 1, -0.2), 0.2)
            self.coef *= 1 + error * completions / self.args.horizon

    def state_dict(self) -> float:
        return self.coef

    def load_state_dict(self, coef: float | None) -> None:
        if not self.args.adap_kl_ctrl:
            return
        if coef is None:
            raise FileNotFoundError(KL_COEF)
        self.coef = float(coef)


class PPOTrainer(BaseTrainer):
    """Trains a causal language model on rewards of its own completions, with a learned value function.

    A batch of prompts is completed. A completion's score, the weighted sum of those of its rewards that apply, is given
    at its end, and at each token a penalty for the divergence from the reference model (`rlkernels.shaped_rewards`).
    Advantages are `rlkernels.gae`'s, whitened over the batch, which then serves `num_ppo_epochs` x `num_mini_batches`
    optimizer steps of `rlkernels.policy_loss` + vf_coef x `rlkernels.value_loss`, means over the tokens of a minibatch.
    A rollout's tokens that are not the model's own, but a tool's, are in neither; advantages carry over them. Nor are
    those of a completion without any reward.

    With num_mini_batches 1, if the rows of each process fit in one micro-batch, the pass that gives the rollout's
    log-probabilities and values is also the forward pass of the first optimizer step.

    Args:
        model: a folder, the name of a model in the local Hugging Face cache, or a model in memory.
        reward_funcs: one or several functions `f(prompts=, completions=, completion_ids=, **columns, trainer_state=,
            log_extra=, log_metric=) -> list[float | None]`, plain or async, by TRL's contract; or reward models:
            sequence classifiers with one label, as model.
        args: the config; `PPOConfig()` if None.
        train_dataset: rows with a `prompt`, a string or a list of messages; further columns go to the reward functions.
            No column may have the name of another of their arguments.
        eval_dataset: the same, or a dict of such.
        processing_class: the tokenizer; the model's own if None.
        value_model: a sequence classifier with one label, of the same tokenizer, as model; trained too. If None, the
            value is a head on the policy's hidden states, so that each pass gives both.
        ref_model: what the model is kept close to; if None, what it is at the start.
        peft_config: of PEFT: the policy's adapters are trained, and the reference is the model without them.
        rollout: what samples the completions, see `rollouts.engine.Engine`; the model itself if None.
    """

    args: PPOConfig

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward_funcs: RewardSource | list[RewardSource],
        args: PPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        value_model: str | PreTrainedModel | None = None,
        ref_model: str | PreTrainedModel | None = None,
        peft_config: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
        rollout: Engine | None = None,
    ) -> None:
        args = PPOConfig() if args is None else copy.copy(args)
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = False
        Collector.check(args, train_dataset, eval_dataset, peft_config, rollout)
        if len(train_dataset) < args.rollout_batch_size:
            raise ValueError(
                f"train_dataset has {len(train_dataset)} rows, fewer than the {args.rollout_batch_size} prompts of one "
                "batch (per_device_train_batch_size x gradient_accumulation_steps x processes)"
            )
        sources = reward_funcs if isinstance(reward_funcs, list | tuple) else [reward_funcs]
        if isinstance(value_model, nn.Module) and any(value_model is source for source in sources):
            raise ValueError("value_model must be another object than the reward model: it changes")
        self.value_model = load_value_model(value_model, args)
        self.has_reference = args.kl_coef != 0
        if ref_model is not None and not self.has_reference:
            raise ValueError("ref_model must be None with kl_coef 0, which keeps the policy close to no model")
        rewards = reward_functions(reward_funcs, args)
        super().__init__(
            model,
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            ref_model=ref_model,
            needs_reference=self.has_reference,
            peft_config=peft_config,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.padding_free = self.model.prepare(self.processing_class, args.device, packs=self.padding_free)
        if self.value_model is not None:
            self.shares_prefixes = self.shares_prefixes and self.can_share([self.value_model])
        self.kl = AdaptiveKL(args)
        self.keep(KL_COEF, self.kl, "its KL coefficient")
        self.undone.append(self.kl)
        self.collector = Collector(
            self,
            self.model.policy,
            rewards,
            rollout,
            experience=Experience,
            prompts=args.rollout_batch_size,
            steps=args.num_ppo_epochs * args.num_mini_batches,
            readers=[] if self.value_model is None else [self.value_model],
            run=lambda *given: self.model.generate(*given),
        )

    def trained(self, model: nn.Module) -> nn.Module:
        return PolicyAndValue(model, self.value_model)

    @property
    def completions(self) -> list[dict[str, Any]]:
        """The latest completions over all processes, a dict each: for callbacks that show or save them."""
        return self.collector.latest.rows

    def model_parts(self) -> dict[str, nn.Module]:
        return {"": self.model.policy, VALUE: self.model.value}

    # From rows to the experience that the steps learn from

    def make_experience(self, rows: list[dict[str, Any]]) -> Experience:
        collector = self.collector
        samples = collector.collect(rows)
        outcomes = samples.outcomes(self.accelerator)
        collector.record(outcomes)
        self.metrics.add("val/num_eos_tokens", outcomes[:, -1].sum())
        self.add_tokens_seen(samples.num_tokens())
        scores, is_scored = (samples.rewards * collector.reward_weights).nansum(1), ~samples.rewards.isnan().all(1)
        if self.args.missing_eos_penalty is not None:
            ended = torch.tensor([rollout.ended for rollout in samples.rollouts], device=scores.device)
            scores = scores - self.args.missing_eos_penalty * ~ended

        corrects = self.args.importance_sampling_correction
        sequences = collector.sequences(samples.rollouts)
        for row in (~is_scored).nonzero().flatten().tolist():
            sequences[row].labels = [IGNORE] * len(sequences[row])
        batch = self.lay_out(sequences, Batch)
        mask, cu_seqlens = batch.mask, batch.cu_seqlens
        ref_logprobs, *outputs = self._score(sequences)
        logprobs, values, *entropy = (each.detach() for each in outputs)
        # If there is room for another token, the state after the last one has a value too, and its reward is the score.
        has_value = mask.clone()
        if self.args.score_at == "after_last":
            lengths = torch.tensor([len(rollout.completion_ids) for rollout in samples.rollouts], device=mask.device)
            has_value[cu_seqlens[1:].long() - 1] = is_scored & (lengths < self.args.response_length)
        rewards = rlkernels.shaped_rewards(
            scores,
            logprobs,
            ref_logprobs,
            has_value,
            kl_coef=self.kl.coef,
            estimator=self.args.kl_estimator,
            cu_seqlens=cu_seqlens,
        )
        group = torch.distributed.group.WORLD if self.accelerator.num_processes > 1 else None
        if self.args.whiten_rewards:
            rewards = rlkernels.masked_whiten(rewards, has_value, shift_mean=False, group=group)
        advantages, returns = rlkernels.gae(
            rewards, values, has_value, gamma=self.args.gamma, lam=self.args.lam, cu_seqlens=cu_seqlens
        )
        advantages = rlkernels.masked_whiten(advantages, mask, group=group)
        self._record_experience(scores[is_scored], logprobs, ref_logprobs)
        self.metrics.add("val/explained_variance", self._explained_variance(values, returns, has_value))
        counts = batch.sequence_sums(mask.float()).clamp(min=1)
        collector.show(samples, (batch.sequence_sums(advantages) / counts).tolist())
        return Experience(
            sequences=sequences,
            order=[self._draw_order(len(sequences), epoch) for epoch in range(self.args.num_ppo_epochs)],
            old_logprobs=batch.split(logprobs),
            old_values=batch.split(values),
            advantages=batch.split(advantages),
            returns=batch.split(returns),
            has_value=batch.split(has_value),
            sampler_logprobs=collector.sampler_logprobs(samples.rollouts, sequences) if corrects else None,
            forward_pass=[batch.split(each) for each in outputs] if entropy else None,
        )

    def _score(self, sequences: list[Sequence]) -> list[Tensor]:
        """The reference's log-probabilities, the policy's, and values, each [N] over all sequences. Where the first
        step runs all of them at once, on every process, this pass is also its forward pass: the last two have a graph,
        and the entropy follows."""
        options: dict[str, Any] = {"fused": self.fused, "temperature": self.args.temperature}
        found: list[Any] = [None] * len(sequences)
        chunks = self.even_chunks(sequences)
        # A router loss comes from a pass in compute_loss.
        serves_step = len(chunks) == self.args.num_mini_batches == 1 and self.router is None
        for chunk in chunks:
            batch = self.lay_out([sequences[row] for row in chunk], Batch)
            ref_logprobs = self._ref_logprobs(batch, options) if self.has_reference else None
            with torch.set_grad_enabled(serves_step):
                policy, values = self.model_wrapped(
                    scoring.token_logprobs, batch, return_entropy=serves_step, **options
                )
            logprobs, *entropy = policy if serves_step else [policy]
            ref_logprobs = logprobs.detach() if ref_logprobs is None else ref_logprobs
            parts = (batch.split(each) for each in (ref_logprobs, logprobs, values, *entropy))
            for row, *each in zip(chunk, *parts, strict=True):
                found[row] = each
        return [torch.cat(parts) for parts in zip(*found, strict=True)]

    def _ref_logprobs(self, batch: Batch, options: dict[str, Any]) -> Tensor:
        with self.accelerator.autocast(), self.reference() as reference:
            if self.reference_model is None:
                return reference(scoring.token_logprobs, batch, gives_values=False, **options)[0]
            return scoring.token_logprobs(reference, batch, **options)

    def _draw_order(self, count: int, epoch: int) -> list[int]:
        """This process's rows, minibatch after minibatch. Every num_mini_batches consecutive rows are dealt out at
        random, one to each minibatch. The draw depends on the number of the first of them among the rows of all
        processes, so that a minibatch holds the same rows, and as many of each process, however many there are."""
        parts, drawn = self.args.num_mini_batches, []
        for start, number in zip(range(0, count, parts), self.collector.own_rows(count)[::parts], strict=True):
            rows = list(range(start, start + parts))
            random.Random(f"{self.args.seed} {self.state.global_step} {epoch} {number}").shuffle(rows)
            drawn.append(rows)
        return [row for minibatch in zip(*drawn, strict=True) for row in minibatch]

    def _explained_variance(self, values: Tensor, returns: Tensor, has_value: Tensor) -> Tensor:
        """The explained variance of the values, over all processes."""
        own = torch.stack([values, returns, has_value.to(values.dtype)], 1)
        values, returns, known = self.accelerator.gather(self.accelerator.pad_across_processes(own)).T.unsqueeze(1)
        _, metrics = rlkernels.value_loss(values, None, returns, known.bool(), clip=None)
        return metrics[rlkernels.value_loss.metrics.index("explained_variance")]  # type: ignore[attr-defined]

    def _record_experience(self, scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor) -> None:
        """Logs sums over tokens as means over the completions with a score, as in TRL. Adapts the KL coefficient."""
        kl = rlkernels.kl_penalty(logprobs, ref_logprobs, estimator=self.args.kl_estimator)
        sums = torch.stack([kl.sum(), -logprobs.sum(), scores.sum(), scores.new_tensor(len(scores))])
        *sums, rows = self.accelerator.reduce(sums).tolist()
        kl, entropy, score = (each / max(rows, 1) for each in sums)
        self.metrics.add("objective/entropy", entropy, rows)
        self.metrics.add("objective/scores", score, rows)
        self.metrics.add("objective/rlhf_reward", score - self.kl.coef * kl, rows)
        if self.has_reference:
            self.metrics.add("objective/kl", kl, rows)
            self.metrics.add("objective/kl_coef", self.kl.coef)
            self.metrics.add("objective/non_score_reward", -self.kl.coef * kl, rows)
        self.kl.update(kl, rows)

    # The optimizer step

    def micro_batches(self, inputs: list[dict[str, Any]]) -> list[Batch]:
        experience, step = self.collector.experience(inputs, self.make_experience)
        epoch, part = divmod(step, self.args.num_mini_batches)
        size = len(experience.sequences) // self.args.num_mini_batches
        rows = experience.order[epoch][part * size : (part + 1) * size]
        chunks = [self.chunks(experience.sequences, part) for part in self.parts(rows)]
        batches = self.joined([[self._lay_out(experience, chunk) for chunk in part] for part in chunks])
        experience.forward_pass = None  # its graph serves one backward pass
        counts = torch.stack([places.sum() for batch in batches for places in (batch.mask, batch.has_value)])
        # Losses are means over the tokens of all processes. These average their gradients, so that each divides by the
        # mean count.
        counts = self.accelerator.reduce(counts.view(-1, 2).sum(0)) / self.accelerator.num_processes
        normalizer, value_normalizer = counts.clamp(min=1).unbind()
        return self.even_out(
            [replace(batch, normalizer=normalizer, value_normalizer=value_normalizer) for batch in batches]
        )

    def _lay_out(self, experience: Experience, rows: list[int]) -> PPOBatch:
        device = self.accelerator.device
        sequences = [experience.sequences[row] for row in rows]
        known = {name: parts for name in PER_TOKEN if (parts := getattr(experience, name)) is not None}
        per_token = {name: torch.cat([parts[row] for row in rows]).to(device) for name, parts in known.items()}
        forward_pass = None
        if experience.forward_pass is not None:
            forward_pass = [torch.cat([parts[row] for row in rows]) for parts in experience.forward_pass]
        return self.lay_out(sequences, PPOBatch, forward_pass=forward_pass, **per_token)

    def compute_loss(self, model: nn.Module, batch: PPOBatch) -> Tensor:
        args = self.args
        options = {
            "clip_low": args.cliprange,
            "clip_high": args.cliprange,
            "normalizer": batch.normalizer,
            **args.sampler_correction(batch.sampler_logprobs),
        }
        if batch.forward_pass is None:
            (policy_loss, policy), values = model(
                scoring.policy_loss,
                batch,
                batch.old_logprobs,
                batch.advantages,
                fused=self.fused,
                temperature=args.temperature,
                **options,
            )
        else:
            logprobs, values, entropy = batch.forward_pass
            policy_loss, policy = rlkernels.policy_loss(
                logprobs,
                batch.old_logprobs,
                batch.advantages,
                batch.mask,
                entropy=entropy.detach(),
                cu_seqlens=batch.cu_seqlens,
                **options,
            )
        value_loss, value = rlkernels.value_loss(
            values,
            batch.old_values,
            batch.returns,
            batch.has_value,
            clip=args.cliprange_value,
            cu_seqlens=batch.cu_seqlens,
            normalizer=batch.value_normalizer,
        )
        self._record_losses(
            policy_loss.detach() * batch.normalizer,
            dict(zip(rlkernels.policy_loss.metrics, policy.unbind(), strict=True)),  # type: ignore[attr-defined]
            value_loss.detach() * batch.value_normalizer,
            dict(zip(rlkernels.value_loss.metrics, value.unbind(), strict=True)),  # type: ignore[attr-defined]
        )
        return policy_loss + args.vf_coef * value_loss

    def _record_losses(
        self, policy_sum: Tensor, policy: dict[str, Tensor], value_sum: Tensor, value: dict[str, Tensor]
    ) -> None:
        """Means over tokens."""
        tokens = policy["num_tokens"]
        self.metrics.add("loss/policy_avg", policy_sum / tokens, tokens)
        self.metrics.add("policy/approxkl_avg", policy["approx_kl"], tokens)
        self.metrics.add("policy/clipfrac_avg", policy["clip_fraction_low"] + policy["clip_fraction_high"], tokens)
        self.metrics.add("policy/entropy_avg", policy["entropy"], tokens)
        self.metrics.add("val/ratio", policy["ratio_mean"], tokens)
        self.collector.record_correction(policy)
        tokens = value["num_tokens"]
        self.metrics.add("loss/value_avg", value_sum / tokens, tokens)
        self.metrics.add("val/clipfrac_avg", value["clip_fraction"], tokens)
