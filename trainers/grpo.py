"""Group relative policy optimization (DeepSeekMath, arXiv 2402.03300) and its variants by loss type."""

import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from .base.trainer import BaseTrainer
from .batch.batch import IGNORE, Batch, Sequence
from .losses import advantages, objectives
from .rollouts.collector import Collector, reward_functions
from .rollouts.config import OnlineConfig, RewardSource
from .rollouts.engine import Engine
from .rollouts.samples import Samples


@dataclass(repr=False)
class GRPOConfig(OnlineConfig):
    """Options of `GRPOTrainer`. On each process an optimizer step learns from `gradient_accumulation_steps` x
    `per_device_train_batch_size` completions; `steps_per_generation` x `per_device_train_batch_size` are sampled at a
    time."""

    num_generations: int = field(
        default=8, metadata={"help": "Completions sampled per prompt, which is the size of a group."}
    )
    num_generations_eval: int | None = field(
        default=None, metadata={"help": "Completions per prompt in evaluation; num_generations if unset."}
    )
    generation_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Completions sampled at a time, over all processes. Set this or steps_per_generation, not both."
        },
    )
    steps_per_generation: int | None = field(
        default=None,
        metadata={
            "help": "How many times per_device_train_batch_size completions each process samples at a time: a multiple "
            "of gradient_accumulation_steps, which is the default."
        },
    )

    beta: float = field(
        default=0.0,
        metadata={"help": "Coefficient of the KL penalty to the initial model. With 0 no reference model is kept."},
    )
    use_bias_correction_kl: bool = field(
        default=True,
        metadata={
            "help": "Multiply the KL penalty by the importance ratio, so that its gradient is that of the reverse KL."
        },
    )
    num_iterations: int = field(default=1, metadata={"help": "Passes over the completions that were sampled together."})
    epsilon: float = field(
        default=0.2,
        metadata={
            "help": "The importance ratio is clipped from below at 1 - epsilon. loss_type gmpo clips its logarithm; "
            "dppo_tv and dppo_kl drop tokens whose probability changed by more than epsilon."
        },
    )
    epsilon_high: float | None = field(
        default=None,
        metadata={
            "help": "The ratio is clipped from above at 1 + epsilon_high; epsilon if unset. With loss_type cispo it is "
            "clipped at epsilon_high itself, such as 5.0."
        },
    )
    delta: float | None = field(
        default=None,
        metadata={
            "help": "Upper bound of the ratio where the advantage is negative; it must be above 1 + epsilon_high. For "
            "loss_type grpo, bnpo, dr_grpo, dapo, luspo. dppo_tv and dppo_kl bound their weights by it; by 20 if unset."
        },
    )
    importance_sampling_level: str = field(
        default="token",
        metadata={
            "help": "token: one importance ratio per token. sequence: one per completion, the geometric mean over its "
            "tokens (GSPO). For loss_type grpo, bnpo, dr_grpo, dapo, luspo; the others have a fixed level.",
            "choices": ["token", "sequence"],
        },
    )
    loss_type: str = field(
        default="dapo",
        metadata={
            "help": "The objective, and how token losses are aggregated. The clipped ratio: grpo (mean over each "
            "completion, then over completions), bnpo (mean over the tokens of per_device_train_batch_size "
            "completions), dr_grpo (sum over completions x max_completion_length), dapo (mean over the tokens of an "
            "optimizer step), luspo (sum over each completion, mean over completions). Other objectives, aggregated "
            "as dapo: cispo, vespo, dppo_tv, dppo_kl, reinforce; as grpo: sapo, gmpo. Their equations are in "
            "`rlkernels.policy_loss`.",
            "choices": [*objectives.OBJECTIVES],
        },
    )
    sapo_temperature_neg: float = field(
        default=1.05, metadata={"help": "Temperature of loss_type sapo where the advantage is not positive."}
    )
    sapo_temperature_pos: float = field(
        default=1.0, metadata={"help": "Temperature of loss_type sapo where the advantage is positive."}
    )
    vespo_k_pos: float = field(
        default=2.0, metadata={"help": "Power of a sequence's weight below 1 in loss_type vespo, advantage positive."}
    )
    vespo_lambda_pos: float = field(
        default=3.0, metadata={"help": "Decay of a sequence's weight above 1 in loss_type vespo, advantage positive."}
    )
    vespo_k_neg: float = field(
        default=3.0, metadata={"help": "Power of a sequence's weight below 1 in loss_type vespo, advantage negative."}
    )
    vespo_lambda_neg: float = field(
        default=2.0, metadata={"help": "Decay of a sequence's weight above 1 in loss_type vespo, advantage negative."}
    )
    top_entropy_quantile: float = field(
        default=1.0,
        metadata={
            "help": "The policy loss covers only this fraction of an optimizer step's tokens, over all processes: "
            "those with the highest entropy. Below 1 it costs another forward pass."
        },
    )
    mask_truncated_completions: bool = field(
        default=False, metadata={"help": "Leave completions without an end token out of the loss."}
    )

    overlong_buffer_length: int | None = field(
        default=None,
        metadata={
            "help": "Penalize length (DAPO): another reward falls from 0 to -1 over this many tokens before "
            "max_completion_length. Tools' tokens do not count. No such reward if unset."
        },
    )
    overlong_penalty: float = field(default=1.0, metadata={"help": "Weight of the reward of overlong_buffer_length."})
    dynamic_sampling_max_rounds: int = field(
        default=0,
        metadata={
            "help": "Replace groups whose rewards are all equal, which teach nothing, by sampling other prompts, at "
            "most this many times whenever completions are sampled (DAPO). 0: keep them."
        },
    )

    advantage: str = field(
        default="grpo",
        metadata={
            "help": "The baseline of a completion's reward. grpo: the mean of its group. rloo: the mean of the group's "
            "other completions; with loss_type luspo a step is RLOO's. reinforce_plus_plus: the mean over all tokens "
            "that were sampled together; the difference is divided by their standard deviation. With the last two, "
            "beta x KL is part of the reward, not of the loss.",
            "choices": ["grpo", "rloo", "reinforce_plus_plus"],
        },
    )
    scale_rewards: str = field(
        default="group",
        metadata={
            "help": "With advantage grpo, divide by the standard deviation of the rewards in the group (group), of all "
            "completions sampled together (batch), or not at all (none).",
            "choices": ["group", "batch", "none"],
        },
    )
    multi_objective_aggregation: str = field(
        default="sum_then_normalize",
        metadata={
            "help": "With several rewards. sum_then_normalize: sum them, then normalize in each group. "
            "normalize_then_sum: normalize each reward in its group, sum, then normalize over all completions sampled "
            "together.",
            "choices": ["sum_then_normalize", "normalize_then_sum"],
        },
    )

    def __post_init__(self) -> None:
        if isinstance(self.scale_rewards, bool):
            self.scale_rewards = "group" if self.scale_rewards else "none"
        super().__post_init__()
        if self.num_generations < (1 if self.advantage == "reinforce_plus_plus" else 2):
            raise ValueError(f"num_generations must be at least 2, to have a group; got {self.num_generations}")
        buffer = self.overlong_buffer_length
        if buffer is not None and not 0 < buffer <= self.max_completion_length:
            raise ValueError(
                f"overlong_buffer_length must be between 1 and max_completion_length ({self.max_completion_length}); "
                f"got {buffer}"
            )
        self._check_combinations()
        self._set_generation_batch()

    @property
    def kl_in_reward(self) -> bool:
        return self.beta > 0 and self.advantage != "grpo"

    def _check_combinations(self) -> None:
        if self.loss_type == "cispo" and (self.epsilon_high or 0) < 1:
            raise ValueError(
                f"epsilon_high must be at least 1 with loss_type cispo, which clips the ratio there; got "
                f"{self.epsilon_high}"
            )
        if self.importance_sampling_level == "sequence" and objectives.OBJECTIVES[self.loss_type][0] != "ppo":
            by_level = ", ".join(name for name, (objective, _) in objectives.OBJECTIVES.items() if objective == "ppo")
            raise ValueError(
                f"importance_sampling_level 'sequence' goes with loss_type {by_level}; got {self.loss_type!r}"
            )
        if self.multi_objective_aggregation == "normalize_then_sum" and self.advantage != "grpo":
            raise ValueError(
                f"multi_objective_aggregation 'normalize_then_sum' goes with advantage 'grpo'; got {self.advantage!r}"
            )
        if self.dynamic_sampling_max_rounds and self.num_generations < 2:
            raise ValueError("dynamic_sampling_max_rounds needs groups: num_generations must be at least 2; got 1")

    def _set_generation_batch(self) -> None:
        step = self.per_device_train_batch_size * self.world_size
        if self.generation_batch_size is not None:
            # A config that was processed before and is read back has both, and they agree.
            if self.steps_per_generation not in (None, self.generation_batch_size / step):
                raise ValueError("generation_batch_size and steps_per_generation exclude each other; set one")
            if self.generation_batch_size % step:
                raise ValueError(
                    f"generation_batch_size ({self.generation_batch_size}) must be a multiple of "
                    f"per_device_train_batch_size x processes ({step})"
                )
            self.steps_per_generation = self.generation_batch_size // step
        elif self.steps_per_generation is None:
            self.steps_per_generation = self.gradient_accumulation_steps
        if self.steps_per_generation < 1 or self.steps_per_generation % self.gradient_accumulation_steps:
            raise ValueError(
                f"steps_per_generation ({self.steps_per_generation}) must be a multiple of gradient_accumulation_steps "
                f"({self.gradient_accumulation_steps}), so that an optimizer step sees one batch of completions"
            )
        self.generation_batch_size = step * self.steps_per_generation
        if self.generation_batch_size % self.num_generations:
            raise ValueError(
                f"the batch of {self.generation_batch_size} completions (per_device_train_batch_size "
                f"{self.per_device_train_batch_size} x processes {self.world_size} x steps_per_generation "
                f"{self.steps_per_generation}) must be divisible by num_generations ({self.num_generations})"
            )


@dataclass
class Experience:
    """What the optimizer steps on one generation batch learn from, on this process. Lists have an entry per row; values
    per token are those of its branch, shifted, as in `Batch`."""

    sequences: list[Sequence]
    advantages: list[float]
    in_loss: list[bool]  # False: truncated, and mask_truncated_completions is set
    num_tokens: float  # tokens in the loss, mean over the processes
    token_advantages: list[Tensor] | None = None  # None: each token's is its completion's
    old_logprobs: list[Tensor | None] | None = None  # None: those of the current weights
    ref_logprobs: list[Tensor | None] | None = None  # None: there is no KL penalty in the loss
    sampler_logprobs: list[Tensor] | None = None  # None: they are not corrected for

    def has_gradient(self, row: int) -> bool:
        by_token = self.token_advantages
        signal = self.advantages[row] != 0 if by_token is None else bool(by_token[row].any())
        return self.in_loss[row] and (signal or self.ref_logprobs is not None)

    def scored(self, row: int) -> int:
        return sum(label != IGNORE for label in self.sequences[row].labels)


@dataclass(frozen=True, kw_only=True, eq=False)
class GRPOBatch(Batch):
    """Completions with what their loss takes:

    advantages         float32 [S], or [N] if each token has its own
    old_logprobs       float32 [N]: the log-probabilities under the policy that the first step on these completions
                       started with; None: that is the policy of now
    ref_logprobs       float32 [N]: the reference's log-probabilities; None if there is no KL penalty in the loss
    sampler_logprobs   float32 [N]: the engine's log-probabilities; None if they are not corrected for
    top_entropy        bool [N]: the tokens that the policy loss is limited to; None: all
    """

    advantages: Tensor
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    sampler_logprobs: Tensor | None = None
    top_entropy: Tensor | None = None


class GRPOTrainer(BaseTrainer):
    """Trains a causal language model on rewards of its own completions.

    For each prompt `num_generations` completions are sampled; a completion's advantage is its reward against the others
    of its prompt, or of the batch (`args.advantage`), and the loss is one of `rlkernels.policy_loss`
    (`args.loss_type`). Log-probabilities come from `rlkernels.wrap_lm_head`, without logits; a model that it refuses is
    trained by its logits, after a warning.

    Args:
        model: a folder, the name of a model in the local Hugging Face cache, or a model in memory.
        reward_funcs: one or several functions `f(prompts=, completions=, completion_ids=, **columns, trainer_state=,
            log_extra=, log_metric=) -> list[float | None]`, plain or async, by TRL's contract.
        args: the config; `GRPOConfig()` if None.
        train_dataset: rows with a `prompt`, a string or a list of messages; further columns go to the reward functions.
            No column may have the name of another of their arguments.
        eval_dataset: the same, or a dict of such.
        processing_class: the tokenizer; the model's own if None.
        peft_config: of PEFT: adapters are trained, and the reference is the model without them.
        rollout: what samples the completions, see `rollouts.engine.Engine`; the model itself if None.
    """

    args: GRPOConfig

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward_funcs: RewardSource | list[RewardSource],
        args: GRPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        peft_config: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
        rollout: Engine | None = None,
    ) -> None:
        args = GRPOConfig() if args is None else args
        Collector.check(args, train_dataset, eval_dataset, peft_config, rollout)
        prompts = args.generation_batch_size // args.num_generations
        if len(train_dataset) < prompts:
            raise ValueError(
                f"train_dataset has {len(train_dataset)} rows, fewer than the {prompts} prompts of one "
                f"generation batch ({args.generation_batch_size} completions, {args.num_generations} per prompt)"
            )
        # The name of a reward that this trainer itself logs.
        taken = () if args.overlong_buffer_length is None else ("overlong",)
        rewards = reward_functions(reward_funcs, args, taken)
        super().__init__(
            model,
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            peft_config=peft_config,
            needs_reference=args.beta > 0,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.collector = Collector(
            self,
            self.model,
            rewards,
            rollout,
            experience=Experience,
            prompts=prompts,
            num_generations=args.num_generations,
            num_generations_eval=args.num_generations_eval or args.num_generations,
            steps=args.steps_per_generation * args.num_iterations // self.accumulation_steps,
        )
        # A batch of the dataloader is the prompts of a whole generation batch, repeated for each step it serves.
        self.train_batch_size = args.train_batch_size * args.steps_per_generation

    @property
    def completions(self) -> list[dict[str, Any]]:
        """The latest completions over all processes, a dict each: for callbacks that show or save them."""
        return self.collector.latest.rows

    # From rows to the experience that the steps learn from

    def make_experience(self, rows: list[dict[str, Any]]) -> Experience:
        args = self.args
        samples, rewards, weights = self._collect_groups(rows)
        experience = Experience(
            sequences=self.collector.sequences(samples.rollouts),
            advantages=[0.0] * len(rows),
            in_loss=[rollout.ended or not args.mask_truncated_completions for rollout in samples.rollouts],
            num_tokens=0.0,
        )
        scored = sum(experience.scored(row) for row, counts in enumerate(experience.in_loss) if counts)
        scored = self.accelerator.reduce(torch.tensor(scored, device=rewards.device)).item()
        experience.num_tokens = scored / self.accelerator.num_processes
        if args.importance_sampling_correction:
            experience.sampler_logprobs = self.collector.sampler_logprobs(samples.rollouts, experience.sequences)
        if args.beta > 0:
            with self.reference() as reference:
                experience.ref_logprobs = self._score(reference, experience, experience.in_loss)
        if args.kl_in_reward:
            experience.old_logprobs = self._score(self.model_wrapped, experience, experience.in_loss)
        self._set_advantages(experience, rewards, weights)
        self.collector.show(samples, experience.advantages)
        if self.collector.buffer.steps == 1:
            experience.old_logprobs = None
        elif experience.old_logprobs is None:
            is_run = [self._is_run(experience, row) for row in range(len(rows))]
            experience.old_logprobs = self._score(self.model_wrapped, experience, is_run)
        return experience

    def _collect_groups(self, rows: list[dict[str, Any]]) -> tuple[Samples, Tensor, Tensor]:
        """Samples of this process; rewards of all processes, since a group may lie on several, and their weights.

        For up to `dynamic_sampling_max_rounds` rounds other prompts take the place of those without signal."""
        args, collector = self.args, self.collector
        size, most = args.num_generations, args.dynamic_sampling_max_rounds
        first = self.accelerator.process_index * len(rows)
        total = self.accelerator.num_processes * len(rows)
        others = self._other_prompts(rows) if most else iter(())
        samples = collector.collect(rows)
        self.add_tokens_seen(samples.num_tokens())
        rounds = 0
        while True:
            outcomes = samples.outcomes(self.accelerator)
            rewards, lengths = outcomes[:, :-2], outcomes[:, -2]
            rewards, weights = advantages.with_overlong(rewards, collector.reward_weights, lengths, args)
            signal = advantages.signal(rewards, weights, size)
            if rounds == most:
                break
            idle = (~signal.view(-1, size).any(1)).nonzero().flatten().tolist()
            prompts = dict(zip(idle, others, strict=False))
            if not prompts:
                break
            rounds += 1
            places = [row for row in range(len(rows)) if (first + row) // size in prompts]
            if places:
                drawn = collector.rows(prompts[(first + row) // size] for row in places)
                # The columns are those that the Trainer left.
                drawn = [{name: row[name] for name in rows[0]} for row in drawn]
                numbers = [first + row + rounds * total for row in places]
                samples.replace(places, collector.collect(drawn, numbers))
            else:  # a sharded model must generate on every process
                collector.complete([rows[0]["prompt"]], collector.sampling)
            self.add_tokens_seen(samples.num_tokens(places))
        collector.record(outcomes)
        self.metrics.add("frac_reward_zero_std", 1 - signal.float().mean())
        if most:
            self.metrics.add("dynamic_sampling/rounds", rounds)
        if args.overlong_buffer_length is not None:
            self.metrics.add("rewards/overlong/mean", rewards[:, -1].nanmean())
        return samples, rewards, weights

    def _other_prompts(self, rows: list[dict[str, Any]]) -> Iterator[int]:
        """Prompts that are not in this batch, at random: the same on every process, and in a resumed run."""
        size = len(self.train_dataset)
        most = self.collector.prompt_sampler.prompts * (self.args.dynamic_sampling_max_rounds + 1)
        drawn = random.Random(f"{self.args.seed} {self.state.global_step}").sample(range(size), min(size, most))
        present = set(gather_object([row["_row_id"] for row in rows]))
        return (index for index in drawn if index not in present)

    def _set_advantages(self, experience: Experience, rewards: Tensor, weights: Tensor) -> None:
        args, count = self.args, len(experience.in_loss)
        own = slice(self.accelerator.process_index * count, (self.accelerator.process_index + 1) * count)
        if args.advantage == "grpo":
            experience.advantages = advantages.grpo(rewards, weights, args)[own].tolist()
            return
        batch = self._lay_out(experience, range(count))
        nothing = torch.zeros(len(batch.mask), device=rewards.device)
        old, ref = (nothing if each is None else each for each in (batch.old_logprobs, batch.ref_logprobs))
        scores = advantages.scores(rewards, weights)
        if args.advantage == "rloo":
            kl = self.accelerator.gather(batch.sequence_sums(old - ref))
            experience.advantages = advantages.rloo(scores, kl, args.beta, args.num_generations)[own].tolist()
        else:
            counted = torch.tensor(experience.in_loss, device=rewards.device) & ~scores[own].isnan()
            batch = replace(batch, mask=batch.mask & batch.spread(counted))
            group = torch.distributed.group.WORLD if self.accelerator.num_processes > 1 else None
            values = advantages.reinforce_plus_plus(scores[own], old, ref, batch, args.beta, group)
            experience.advantages = batch.sequence_means(values).tolist()
            experience.token_advantages = [part.clone() for part in batch.split(values.cpu())]
        if args.kl_in_reward:
            tokens = max(experience.num_tokens, 1)
            self.metrics.add("kl", (old - ref).sum() / tokens, tokens)
            experience.ref_logprobs = None

    def _score(
        self, model: nn.Module, experience: Experience, wanted: list[bool], entropy: bool = False
    ) -> list[Tensor | None]:
        """Log-probabilities of each wanted row's tokens, or the entropies of their distributions, NaN where there is
        none. Without dropout, as they were sampled."""
        scores: list[Tensor | None] = [None] * len(wanted)
        rows = [row for row, is_wanted in enumerate(wanted) if is_wanted]
        for chunk in self.even_chunks(experience.sequences, rows):
            batch = self._lay_out(experience, chunk)
            with self.frozen(model):
                scored = self.token_logprobs(model, batch, temperature=self.args.temperature, return_entropy=entropy)
            if entropy:
                scored = scored[1].masked_fill(~batch.mask, math.nan)
            for row, values in zip(chunk, batch.split(scored), strict=True):
                scores[row] = values.clone() if wanted[row] else None
        return scores

    # The optimizer step

    def micro_batches(self, inputs: list[dict[str, Any]]) -> list[Batch]:
        experience, step = self.collector.experience(inputs, self.make_experience)
        size = self.args.per_device_train_batch_size
        first = step * self.accumulation_steps % self.args.steps_per_generation * size
        rows = range(first, first + size * self.accumulation_steps)
        # bnpo is a mean over the tokens of each per_device_train_batch_size rows; for the other losses rows are alike.
        is_bnpo = self.args.loss_type == "bnpo"
        width = size if is_bnpo or self.router is not None else len(rows)
        kept = None
        if self.args.top_entropy_quantile < 1:
            wanted = [row in rows and counts for row, counts in enumerate(experience.in_loss)]
            entropies = self._score(self.model_wrapped, experience, wanted, entropy=True)
            kept = objectives.top_entropy(entropies, self.args.top_entropy_quantile, self.accelerator)
        parts: list[list[Batch]] = []
        for start in range(rows.start, rows.stop, width):
            part = range(start, start + width)
            normalizer = self._normalizer(experience, part if is_bnpo else rows)
            parts.append([])
            for chunk in self.chunks(experience.sequences, [row for row in part if self._is_run(experience, row)]):
                top_entropy = None if kept is None else torch.cat([kept[row] for row in chunk])
                parts[-1].append(self._lay_out(experience, chunk, normalizer=normalizer, top_entropy=top_entropy))
        if not any(parts):
            # A filler makes gradients zero, where they would be missing.
            parts = [[self._lay_out(experience, [rows.start], is_filler=True)]]
        return self.even_out(self.joined(parts))

    def _is_run(self, experience: Experience, row: int) -> bool:
        """Whether the row needs a pass through the model: it is in the loss, and has a gradient of its own or a part in
        the router loss."""
        return experience.in_loss[row] and (self.router is not None or experience.has_gradient(row))

    def _normalizer(self, experience: Experience, rows: range) -> float:
        """What the sum over these rows is divided by, as in TRL: rows that are not run count too."""
        loss_type, steps = self.args.loss_type, self.accumulation_steps
        if objectives.OBJECTIVES[loss_type][1].startswith("seq_mean"):
            return len(rows)
        if loss_type == "dr_grpo":
            return len(rows) * self.args.max_completion_length
        if loss_type == "bnpo":
            return max(sum(experience.scored(row) for row in rows if experience.in_loss[row]), 1) * steps
        return max(experience.num_tokens, 1) * steps / self.args.steps_per_generation

    def _lay_out(self, experience: Experience, rows: Iterable[int], **fields: Any) -> GRPOBatch:
        device = self.accelerator.device
        sequences = [experience.sequences[row] for row in rows]
        if experience.token_advantages is None:
            fields["advantages"] = torch.tensor([experience.advantages[row] for row in rows], device=device)
        else:
            fields["advantages"] = torch.cat([experience.token_advantages[row].to(device) for row in rows])
        for name in ("old_logprobs", "ref_logprobs", "sampler_logprobs"):
            known = getattr(experience, name)
            if known is not None:
                lengths = [sequence.branch_length for sequence in sequences]
                parts = [
                    torch.zeros(length) if known[row] is None else known[row]
                    for row, length in zip(rows, lengths, strict=True)
                ]
                fields[name] = torch.cat([part.to(device) for part in parts])
        return self.lay_out(sequences, GRPOBatch, **fields)

    def compute_loss(self, model: nn.Module, batch: GRPOBatch) -> Tensor:
        loss, values = objectives.policy_loss(model, batch, self.args, fused=self.fused)
        self._record_loss(values)
        return loss

    def _record_loss(self, values: dict[str, Tensor]) -> None:
        weight = values["num_tokens"]
        low, high = values["clip_fraction_low"], values["clip_fraction_high"]
        self.metrics.add("clip_ratio/low_mean", low, weight)
        self.metrics.add("clip_ratio/high_mean", high, weight)
        self.metrics.add("clip_ratio/region_mean", low + high, weight)
        self.metrics.add("ratio_mean", values["ratio_mean"], weight)
        self.metrics.add("entropy", values["entropy"], weight)
        if self.args.beta > 0 and not self.args.kl_in_reward:
            self.metrics.add("kl", values["ref_kl"], weight)
        self.collector.record_correction(values)
