"""Group relative policy optimization (DeepSeekMath, arXiv 2402.03300) and its variants by loss type."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.utils import logging

import rlkernels

from .common import (
    GroupSampler,
    OnlineTrainer,
    Samples,
    check_columns,
    completion_logprobs,
    completion_logprobs_from_logits,
    completion_policy_loss,
    load_model,
    needs_no_logits,
)
from .configs import GRPOConfig
from .rewards import RewardFunction
from .rollout import lay_out

logger = logging.get_logger(__name__)

AGGREGATION = {
    "grpo": "seq_mean_token_mean",
    "bnpo": "token_sum",
    "dr_grpo": "token_sum",
    "dapo": "token_sum",
}


@dataclass
class Rollouts:
    """This process's completions of one generation batch, a list entry per row."""

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    advantages: list[float]
    in_loss: list[bool]  # False: truncated, and mask_truncated_completions is set
    num_tokens: float  # tokens in the loss, mean over the processes
    old_logprobs: list[Tensor | None] | None = None  # None: those of the current weights
    ref_logprobs: list[Tensor | None] | None = None  # None: beta is 0

    def has_gradient(self, row: int) -> bool:
        return self.in_loss[row] and (self.advantages[row] != 0 or self.ref_logprobs is not None)


class GRPOTrainer(OnlineTrainer):
    """Trains a causal language model on rewards of its own completions.

    For each prompt `num_generations` completions are sampled; a completion's advantage is its reward against the others
    of its prompt (`rlkernels.group_advantages`), and the loss is `rlkernels.policy_loss`. Log-probabilities come from
    `rlkernels.wrap_lm_head`, without logits; a model that it refuses is trained by its logits, after a warning.

    Args:
        model: a folder, the name of a model in the local Hugging Face cache, or a model in memory.
        reward_funcs: one or several functions `f(prompts=, completions=, completion_ids=, **columns, trainer_state=,
            log_extra=, log_metric=) -> list[float | None]`, plain or async, by TRL's contract.
        args: the config; `GRPOConfig()` if None.
        train_dataset: rows with a `prompt`, a string or a list of messages; further columns go to the reward functions.
        eval_dataset: the same, or a dict of such.
        processing_class: the tokenizer; the model's own if None.
    """

    args: GRPOConfig

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward_funcs: RewardFunction | list[RewardFunction],
        args: GRPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
    ) -> None:
        args = GRPOConfig() if args is None else args
        check_columns("train_dataset", train_dataset, "prompt")
        self.prompts_per_batch = args.generation_batch_size // args.num_generations
        if len(train_dataset) < self.prompts_per_batch:
            raise ValueError(
                f"train_dataset has {len(train_dataset)} rows, fewer than the {self.prompts_per_batch} prompts of one "
                f"generation batch ({args.generation_batch_size} completions, {args.num_generations} per prompt)"
            )

        if isinstance(model, str):
            model = load_model(model, args.model_init_kwargs)
        self.needs_no_logits = needs_no_logits(model)
        self.completion_logprobs = completion_logprobs if self.needs_no_logits else completion_logprobs_from_logits
        # A copy is wrapped as the model is.
        reference = copy.deepcopy(model).eval().requires_grad_(False) if args.beta > 0 else None
        super().__init__(
            model=model,
            reward_funcs=reward_funcs,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.reference = None if reference is None else self.accelerator.prepare_model(reference, evaluation_mode=True)
        # Optimizer steps that one generation batch serves.
        self.steps_per_rollout = args.steps_per_generation * args.num_iterations // self.accumulation_steps
        self.rollouts: Rollouts | None = None
        #: The latest generation batch over all processes, a dict per completion: for callbacks that show or save it.
        self.completions: list[dict[str, Any]] = []

    # Data: a batch of the dataloader is the prompts of a whole generation batch, repeated for each step it serves.

    def get_train_dataloader(self) -> DataLoader:
        return self._get_dataloader(
            dataset=self.train_dataset,
            description="Training",
            batch_size=self._train_batch_size * self.args.steps_per_generation,
            sampler_fn=self._get_train_sampler,
            is_training=True,
        )

    def _get_train_sampler(self, train_dataset: Any = None) -> GroupSampler:
        size = len(self.train_dataset)
        steps_per_epoch = size // self.prompts_per_batch * self.steps_per_rollout
        return GroupSampler(
            size,
            self.prompts_per_batch,
            self.args.num_generations,
            self.steps_per_rollout,
            seed=self.args.seed if self.args.shuffle_dataset else None,
            epoch=lambda: self.state.global_step // steps_per_epoch,
        )

    # Rollouts

    def roll_out(self, inputs: list[dict[str, Any]]) -> Rollouts:
        samples = self.sample(inputs, self.metrics)
        outcomes = self.gather_outcomes(samples)
        self.record_outcomes(outcomes, self.metrics)
        # Rewards of all processes: a group may lie on several.
        advantages, signal = rlkernels.group_advantages(
            outcomes[:, :-2],
            group_size=self.args.num_generations,
            scale=self.args.scale_rewards,
            weights=self.reward_weights,
            normalize="after_sum" if self.args.multi_objective_aggregation == "sum_then_normalize" else "before_sum",
            return_signal=True,
        )
        self.metrics.add("frac_reward_zero_std", 1 - signal.float().mean())
        first = self.accelerator.process_index * len(inputs)
        advantages = advantages[first : first + len(inputs)].tolist()
        self.completions = gather_object(self._table(samples, advantages))

        in_loss = [ended or not self.args.mask_truncated_completions for ended in samples.ended]
        lengths = [len(ids) for ids in samples.completion_ids]
        scored = sum(length for length, counts in zip(lengths, in_loss, strict=True) if counts)
        counts = torch.tensor([scored, sum(map(len, samples.prompt_ids)) + sum(lengths)], device=outcomes.device)
        scored, seen = self.accelerator.reduce(counts).tolist()
        self.state.num_input_tokens_seen += seen

        rollouts = Rollouts(
            prompt_ids=samples.prompt_ids,
            completion_ids=samples.completion_ids,
            advantages=advantages,
            in_loss=in_loss,
            num_tokens=scored / self.accelerator.num_processes,
        )
        if self.reference is not None:
            rollouts.ref_logprobs = self._score(self.reference, rollouts, in_loss)
        if self.steps_per_rollout > 1:
            rows = [rollouts.has_gradient(row) for row in range(len(inputs))]
            rollouts.old_logprobs = self._score(self.model_wrapped, rollouts, rows)
        return rollouts

    def _table(self, samples: Samples, advantages: list[float]) -> list[dict[str, Any]]:
        rewards = zip(*samples.rewards.T.tolist(), strict=True)
        return [
            {
                "prompt": samples.prompts[row],
                "completion": samples.completions[row],
                **{f"rewards/{name}": reward for name, reward in zip(self.rewards.names, values, strict=True)},
                "advantage": advantages[row],
                **{column: logged[row] for column, logged in samples.extra.items() if row < len(logged)},
            }
            for row, values in enumerate(rewards)
        ]

    @torch.no_grad()
    def _score(self, model: nn.Module, rollouts: Rollouts, wanted: list[bool]) -> list[Tensor | None]:
        """Log-probabilities of each wanted row's completion, [its length]."""
        scores: list[Tensor | None] = [None] * len(wanted)
        rows = [row for row, is_wanted in enumerate(wanted) if is_wanted]
        size = self.args.per_device_train_batch_size
        chunks = [rows[start : start + size] for start in range(0, len(rows), size)]
        # A sharded model must run equally often on every process.
        chunks += [[0]] * (self.most_on_any_process(len(chunks)) - len(chunks))
        for chunk in chunks:
            logprobs = self.completion_logprobs(model, self._lay_out(rollouts, chunk), self.args.temperature)
            for row, values in zip(chunk, logprobs, strict=True):
                scores[row] = values[: len(rollouts.completion_ids[row])].clone()
        return scores

    # The optimizer step

    def micro_batches(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        step = self.state.global_step % self.steps_per_rollout
        if step == 0 or self.rollouts is None:
            if step:
                logger.warning("The checkpoint holds no rollouts: this step's prompts are completed anew.")
            self.rollouts = self.roll_out(inputs)
        size = self.args.per_device_train_batch_size
        batches = []
        for index in range(step * self.accumulation_steps, (step + 1) * self.accumulation_steps):
            first = index % self.args.steps_per_generation * size
            rows = range(first, first + size)
            with_gradient = [row for row in rows if self.rollouts.has_gradient(row)]
            if with_gradient:
                batch = self._lay_out(self.rollouts, with_gradient)
                batches.append({**batch, "normalizer": self._normalizer(self.rollouts, rows)})
        # Where another process has more to run, and where none has any, a row runs with nothing in the loss: then
        # gradients are zero, not missing, and every process takes part in their reduction.
        for _ in range(max(self.most_on_any_process(len(batches)), 1) - len(batches)):
            batch = self._lay_out(self.rollouts, [0])
            batches.insert(0, {**batch, "mask": torch.zeros_like(batch["mask"]), "normalizer": 1.0})
        return batches

    def _normalizer(self, rollouts: Rollouts, rows: range) -> float:
        """What the sum over a micro-batch is divided by: TRL's, in which all `rows` count, also those not run."""
        steps = self.accumulation_steps
        if self.args.loss_type == "grpo":
            return len(rows) * steps
        if self.args.loss_type == "dr_grpo":
            return len(rows) * self.args.max_completion_length * steps
        if self.args.loss_type == "bnpo":
            return max(sum(len(rollouts.completion_ids[row]) for row in rows if rollouts.in_loss[row]), 1) * steps
        return max(rollouts.num_tokens, 1) * steps / self.args.steps_per_generation

    def _lay_out(self, rollouts: Rollouts, rows: list[int]) -> dict[str, Any]:
        device = self.accelerator.device
        batch = lay_out(
            [rollouts.prompt_ids[row] for row in rows],
            [rollouts.completion_ids[row] for row in rows],
            self.sampler.pad_token_id,
            device,
        )
        batch["advantages"] = torch.tensor([rollouts.advantages[row] for row in rows], device=device)
        width = batch["mask"].shape[1]
        for name in ("old_logprobs", "ref_logprobs"):
            values = getattr(rollouts, name)
            if values is not None:
                empty = torch.zeros(0, device=device)
                known = [empty if values[row] is None else values[row].to(device) for row in rows]
                padded = pad_sequence(known, batch_first=True)
                batch[name] = nn.functional.pad(padded, (0, width - padded.shape[1]))
        return batch

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        old, ref = inputs.get("old_logprobs"), inputs.get("ref_logprobs")
        aggregate: dict[str, Any] = {
            "aggregation": AGGREGATION[self.args.loss_type],
            "normalizer": inputs["normalizer"],
        }
        # ratio x k3 has the gradient ratio x k2's, so that where the ratio is 1 it is the straight-through k3.
        corrected = self.args.use_bias_correction_kl
        fused = old is None or not corrected
        options: dict[str, Any] = {
            "clip_low": self.args.epsilon,
            "clip_high": self.args.epsilon if self.args.epsilon_high is None else self.args.epsilon_high,
            "ref_logprobs": ref,
            "kl_coef": self.args.beta if fused else 0.0,
            "kl_estimator": "k3+" if corrected else "k3",
            **aggregate,
        }
        if self.needs_no_logits and (fused or ref is None):
            loss, values = completion_policy_loss(model, inputs, self.args.temperature, old, **options)
        else:
            logprobs = self.completion_logprobs(model, inputs, self.args.temperature)
            advantages, mask = inputs["advantages"], inputs["mask"]
            loss, values = rlkernels.policy_loss(logprobs, old, advantages, mask, **options)
            if ref is not None and not fused:
                penalty = (logprobs - old).exp() * rlkernels.kl_penalty(logprobs, ref, estimator="k3")
                # With advantage -1, reinforce is the plain mean of what stands in the place of the log-probabilities.
                minus_one = -torch.ones_like(advantages)
                kl, _ = rlkernels.policy_loss(penalty, None, minus_one, mask, objective="reinforce", **aggregate)
                loss = loss + self.args.beta * kl
        names = rlkernels.policy_loss.metrics  # type: ignore[attr-defined]
        self._record_loss(dict(zip(names, values.unbind(), strict=True)))
        return loss

    def _record_loss(self, values: dict[str, Tensor]) -> None:
        weight = values["num_tokens"]
        low, high = values["clip_fraction_low"], values["clip_fraction_high"]
        self.metrics.add("clip_ratio/low_mean", low, weight)
        self.metrics.add("clip_ratio/high_mean", high, weight)
        self.metrics.add("clip_ratio/region_mean", low + high, weight)
        self.metrics.add("ratio_mean", values["ratio_mean"], weight)
        if self.needs_no_logits:
            self.metrics.add("entropy", values["entropy"], weight)
        if self.reference is not None:
            self.metrics.add("kl", values["ref_kl"], weight)

    # Checkpoints: beside what the Trainer keeps, the unfinished rollouts of each process and the reference weights. A
    # resumed run is usually given the model of its start, but may as well be given the checkpoint.

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self.rollouts is not None and self.state.global_step % self.steps_per_rollout:
            torch.save(vars(self.rollouts), self._rollouts_file(output_dir))
        if self.reference is not None and self.args.should_save:
            self.accelerator.unwrap_model(self.reference).save_pretrained(Path(output_dir) / "reference")

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is None:
            return
        file = self._rollouts_file(checkpoint)
        self.rollouts = Rollouts(**torch.load(file, weights_only=True)) if file.is_file() else None
        folder = Path(checkpoint) / "reference"
        if self.reference is not None and folder.is_dir():
            reference = self.accelerator.unwrap_model(self.reference)
            saved = AutoModelForCausalLM.from_pretrained(folder, dtype=reference.dtype)
            reference.load_state_dict(saved.state_dict())

    def _rollouts_file(self, folder: str) -> Path:
        return Path(folder) / f"rollouts_{self.accelerator.process_index}.pth"
