"""From prompts to completions with rewards, for the trainers that learn from their own: `Collector`."""

import contextlib
import dataclasses
import functools
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.utils import logging

from ..base import checkpoints
from ..base.chat import is_chat
from ..base.config import BaseConfig
from ..base.contexts import isolated_rng
from ..base.loading import load_classifier, refuse_prompt_learning
from ..base.metrics import LOGGED, unique
from ..base.rows import NumberedRows, each_part
from ..base.sharding import gathered_once
from ..batch.batch import Sequence, shift
from ..rewards.calls import RewardFunction
from ..rewards.functions import RewardFunctions
from ..rewards.model import RewardModel
from .ahead import SampledAhead
from .completions import CompletionsCallback, LatestCompletions
from .config import OnlineConfig, RewardSource
from .engine import Engine, Rollout, SamplingOptions, check_rollouts, decode
from .experience import ExperienceBuffer
from .generate import TransformersEngine
from .prompts import GroupSampler, check_prompt_columns, check_readable
from .samples import Samples, column_of, record
from .vllm import ServerLost, VLLMEngine
from .weights import write_weights

logger = logging.get_logger(__name__)

# Columns of a dataset that reward functions get under another name, or that would hide what was sampled.
RESERVED = ("prompt", "completion", "completion_ids", "_row_id")
# Columns of the table of completions, next to the rewards.
SHOWN = ("step", "prompt", "completion", "advantage")
# What a resumed run may change and still learn from the experience of its checkpoint: when and by whom completions are
# sampled and rewarded, what is shown of them, and what the loss makes of them.
LATER = {
    *("reward_timeout", "reward_workers", "on_reward_error", "staleness", "use_vllm", "vllm_server_base_url"),
    *("vllm_server_timeout", "vllm_request_timeout", "vllm_max_concurrency", "vllm_weights_folder"),
    *("log_completions", "num_completions_to_print", "log_unique_prompts", "num_generations_eval", "total_episodes"),
    *("importance_sampling_mode", "importance_sampling_cap", "importance_sampling_level", "use_bias_correction_kl"),
    *("epsilon", "epsilon_high", "delta", "loss_type", "sapo_temperature_neg", "sapo_temperature_pos"),
    *("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg", "top_entropy_quantile"),
    *("cliprange", "cliprange_value", "vf_coef", "adap_kl_ctrl", "target_kl", "horizon", "share_prefixes"),
}


def reward_functions(
    reward_funcs: RewardSource | list[RewardSource], args: OnlineConfig, taken: Iterable[str] = ()
) -> RewardFunctions:
    """The functions, with reward models loaded. `taken` are names of rewards that the trainer itself logs."""
    sources = reward_funcs if isinstance(reward_funcs, list | tuple) else [reward_funcs]
    rewards = RewardFunctions(
        [_reward_function(source, args) for source in sources],
        timeout=args.reward_timeout,
        workers=args.reward_workers,
        on_error=args.on_reward_error,
        taken=taken,
    )
    count = len(rewards.names)
    if args.reward_weights is not None and len(args.reward_weights) != count:
        raise ValueError(
            f"reward_weights must have one entry per reward function, {count}; got {len(args.reward_weights)}"
        )
    return rewards


def _reward_function(source: RewardSource, args: OnlineConfig) -> RewardFunction:
    if not isinstance(source, str | nn.Module):
        return source
    return RewardModel(load_classifier("reward_funcs", source, args, trained=True), args)


class Collector:
    """Completes prompts and rewards the completions, for one trainer that learns from them.

    It owns the engine, the step whose weights the engine has, the reward functions, the order of the prompts, what is
    sampled ahead (`staleness`), the experience that the current steps learn from, and the latest completions to show.

    Args:
        trainer: the trainer, whose config, model, tokenizer, metrics and steps these are.
        policy: the model that completes the prompts: the trainer's, or a part of it.
        rewards: the functions, by `reward_functions`.
        rollout: the engine; None: a vLLM server if the config says so, else the policy itself.
        experience: the trainer's dataclass of an experience.
        prompts: prompts in an experience, over all processes.
        num_generations, num_generations_eval: completions per prompt, in training and in evaluation.
        steps: optimizer steps that an experience serves.
        readers: further models that read prompts and completions in the policy's tokens, such as a value model.
        run: run(engine, prompts, options) calls the engine; a sharded model needs it to be part of its own forward.
    """

    @staticmethod
    def check(
        args: OnlineConfig, train_dataset: Any, eval_dataset: Any, peft_config: Any, rollout: Engine | None
    ) -> None:
        """Refuses what can be refused before a model is loaded."""
        refuse_prompt_learning("peft_config", peft_config)
        check_prompt_columns("train_dataset", train_dataset)
        each_part(eval_dataset, check_prompt_columns)
        if rollout is not None and args.use_vllm:
            raise ValueError("rollout and use_vllm, which vllm_server_base_url sets, exclude each other; got both")

    def __init__(
        self,
        trainer: Any,
        policy: Any,
        rewards: RewardFunctions,
        rollout: Engine | None,
        *,
        experience: type,
        prompts: int,
        steps: int,
        num_generations: int = 1,
        num_generations_eval: int = 1,
        readers: Iterable[Any] = (),
        run: Callable[..., list[Rollout]] | None = None,
    ) -> None:
        args: OnlineConfig = trainer.args
        self.trainer, self.args, self.policy, self.rewards = trainer, args, policy, rewards
        self.accelerator, self.tokenizer = trainer.accelerator, trainer.processing_class
        self.num_generations_eval, self._run = num_generations_eval, run
        reward_models = [each for each in rewards.functions if isinstance(each, RewardModel)]
        for model in reward_models:
            model.prepare(self.accelerator, self.tokenizer)
        reference = trainer.reference_model
        readers = [*readers, *([] if reference is None else [self.accelerator.unwrap_model(reference)])]
        limits = check_readable(self._datasets(), policy, readers, reward_models, self.tokenizer, args)
        # Read once: completions that are sampled ahead come from another thread.
        self.vocab_size = min(policy.config.get_text_config(decoder=True).vocab_size, limits.vocab_size)
        weights = [1.0] * len(rewards.names) if args.reward_weights is None else args.reward_weights
        self.reward_weights = torch.tensor(weights, dtype=torch.float32, device=self.accelerator.device)
        self.sampling = SamplingOptions(
            temperature=args.temperature,
            max_completion_length=args.max_completion_length,
            logprobs=args.importance_sampling_correction,
            seed=args.seed,
        )
        self.engine = self._own_engine() if rollout is None else rollout
        self.ahead = SampledAhead()
        if args.staleness and not self._has_own_weights:
            raise ValueError(
                "staleness 1 needs an engine with weights of its own (update_weights), such as that of "
                f"vllm_server_base_url; got {type(self.engine).__name__}"
            )
        self.sent_step: int | None = None  # the step whose weights the engine has
        size = len(trainer.train_dataset)
        steps_per_epoch = size // prompts * steps
        self.prompt_sampler = GroupSampler(
            size,
            prompts,
            num_generations,
            steps,
            seed=args.seed if args.shuffle_dataset else None,
            epoch=lambda: trainer.state.global_step // steps_per_epoch,
        )
        self.buffer = ExperienceBuffer(experience, steps, trainer)
        self.latest = LatestCompletions()
        trainer.keep("rollouts_{process}.pth", self.buffer, "its completions")
        trainer.keep("completions.json", self.latest, "its completions")
        trainer.keep("ahead_{process}.pth", self, "its completions")
        trainer.undone += [self.buffer, self.latest]
        if args.log_completions:
            trainer.add_callback(CompletionsCallback(self.latest, args))

    def _datasets(self) -> dict[str, Any]:
        eval_dataset = self.trainer.eval_dataset
        parts = eval_dataset if isinstance(eval_dataset, dict) else {"": eval_dataset}
        named = {f"eval_dataset['{key}']" if key else "eval_dataset": part for key, part in parts.items()}
        return {"train_dataset": self.trainer.train_dataset, **named}

    def _own_engine(self) -> Engine:
        args = self.args
        if not args.use_vllm:
            return TransformersEngine(self.policy, self.tokenizer, args.chat_template_kwargs)
        return VLLMEngine(
            self.policy,
            self.tokenizer,
            args.vllm_server_base_url,
            args.vllm_weights_folder or Path(args.output_dir) / "vllm_weights",
            chat_template_kwargs=args.chat_template_kwargs,
            timeout=args.vllm_server_timeout,
            request_timeout=args.vllm_request_timeout,
            max_concurrency=args.vllm_max_concurrency,
        )

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Around a whole training. At its start the engine has no weights and nothing is sampled ahead. At its end the
        worker processes of the rewards stop."""
        self.ahead, self.sent_step = SampledAhead(), None
        try:
            yield
        finally:
            self.sent_step = None  # the best weights may have been loaded
            self.rewards.close()

    def settings(self) -> dict[str, Any]:
        """What the experience depends on: a checkpoint's serves a run in which all of these are the same."""
        own, others = ({each.name for each in dataclasses.fields(config)} for config in (self.args, BaseConfig))
        names = ["seed", "bf16", "fp16", *sorted(own - others - LATER)]
        # An experience holds the values of branches if prefixes are shared.
        shared = {"share_prefixes": True} if self.trainer.shares_prefixes else {}
        return {**{name: getattr(self.args, name) for name in names}, "reward_funcs": self.rewards.names, **shared}

    # Training

    def experience(self, rows: list[dict[str, Any]], make: Callable[[list[dict[str, Any]]], Any]) -> tuple[Any, int]:
        """The experience of this step's rows, by `make(rows)` where it is time for one; and how many steps have learned
        from it."""
        return self.buffer.current(rows, make)

    def own_rows(self, count: int) -> range:
        """The numbers, among those of all processes, of `count` rows on each."""
        first = self.accelerator.process_index * count
        return range(first, first + count)

    def collect(
        self, rows: list[dict[str, Any]], numbers: Iterable[int] | None = None, step: int | None = None
    ) -> Samples:
        """Completes the prompts of these rows of the dataset and rewards the completions.

        What is sampled depends on the number of each row, by default its place among those of all processes, and on the
        step, by default the current one."""
        prompts = [row["prompt"] for row in rows]
        options = dataclasses.replace(
            self.sampling,
            step=self.trainer.state.global_step if step is None else step,
            rows=tuple(self.own_rows(len(rows)) if numbers is None else numbers),
        )
        try:
            if numbers is None:
                rollouts = self._complete_batch([row.get("_row_id") for row in rows], prompts, options)
            else:
                self.update_weights()
                rollouts = self.complete(prompts, options)
        except ServerLost as error:
            raise ServerLost(f"{error}. {self._what_stays(options.step)}") from error
        completions = decode(self.tokenizer, [rollout.completion_ids for rollout in rollouts], is_chat(prompts[0]))
        rewards, extra = self._reward(rows, rollouts, completions, options)
        return Samples(prompts, rollouts, completions, rewards.to(self.accelerator.device), extra)

    def _reward(
        self, rows: list[dict[str, Any]], rollouts: list[Rollout], completions: list, options: SamplingOptions
    ) -> tuple[Tensor, dict[str, list]]:
        """The rewards, and the columns that the functions logged."""
        extra: dict[str, list] = {}

        def log_extra(column: str, values: list) -> None:
            extra[unique(column, {*SHOWN, *map(column_of, self.rewards.names), *extra})] = values

        def log_metric(name: str, value: float, weight: float) -> None:
            name = name if name in self.rewards.metrics else LOGGED + name
            self.trainer.metrics.add(name, value, weight)

        given = {name: [row[name] for row in rows] for name in rows[0] if name not in RESERVED}
        given |= {
            "prompts": [row["prompt"] for row in rows],
            "completions": completions,
            "completion_ids": [rollout.completion_ids for rollout in rollouts],
        }
        # A function that seeds would make the training's random numbers repeat themselves: it has others.
        seed = random.Random(f"{self.args.seed} {options.step} {options.rows}").getrandbits(30)
        with isolated_rng(seed, self.accelerator.device):
            rewards = self.rewards(given, trainer_state=self.trainer.state, log_extra=log_extra, log_metric=log_metric)
        return rewards, extra

    def complete(self, prompts: list, options: SamplingOptions) -> list[Rollout]:
        """The engine's rollouts, checked. Every process of a sharded model calls it equally often."""
        # One autocast context around all of generate(): inside it each weight is cast to bfloat16 once, not per token.
        with self.accelerator.autocast(), gathered_once(self.accelerator, self.trainer.model):
            engine = self.engine if self._run is None else functools.partial(self._run, self.engine)
            return self._checked(engine, prompts, options)

    def _checked(self, engine: Engine, prompts: list, options: SamplingOptions) -> list[Rollout]:
        return check_rollouts(engine(prompts, options), prompts, options, self.vocab_size)

    def _complete_batch(self, row_ids: list, prompts: list, options: SamplingOptions) -> list[Rollout]:
        """The rollouts of a batch to learn from. With staleness the engine then begins those of the next one."""
        rollouts = self.ahead.take(options.step, row_ids, prompts)
        is_older = rollouts is not None
        self.update_weights()
        if rollouts is None:
            rollouts = self.complete(prompts, options)
        if self.args.staleness:
            self.trainer.metrics.add("sampling/staleness", is_older)
        step = options.step + self.buffer.steps
        if self.args.staleness and step < self.trainer.state.max_steps:
            order = self.prompt_sampler.of_step(step)
            rows = self.rows(order[row] for row in self.own_rows(len(prompts)))
            coming = dataclasses.replace(options, step=step)
            engine = functools.partial(self._checked, self.engine)
            self.ahead.start(engine, [row["_row_id"] for row in rows], [row["prompt"] for row in rows], coming)
        return rollouts

    def rows(self, indices: Iterable[int]) -> list[dict[str, Any]]:
        """Rows of train_dataset, as the dataloader gives them."""
        dataset = NumberedRows(self.trainer.train_dataset)
        return [dataset[index] for index in indices]

    # The engine's weights

    @property
    def _has_own_weights(self) -> bool:
        return getattr(self.engine, "update_weights", None) is not None

    def update_weights(self) -> None:
        """Gives an engine that has weights of its own the current ones, unless it has them. Every process calls it."""
        step = self.trainer.state.global_step
        if not self._has_own_weights or self.sent_step == step:
            return
        # What is sampled ahead is by one set of weights, on every process.
        self.ahead.wait()
        self.accelerator.wait_for_everyone()

        def save(folder: Path) -> None:
            write_weights(folder, self.policy, self.trainer.model_wrapped, self.accelerator)

        self.engine.update_weights(save, step)  # type: ignore[attr-defined]
        self.sent_step = step

    def _what_stays(self, step: int) -> str:
        """What is left of a run whose engine is gone, and how it goes on."""
        # Several processes may not have lost it all, and would not save together; evaluation has other random numbers.
        trainer = self.trainer
        last = checkpoints.last_checkpoint(Path(self.args.output_dir))
        is_saved = last is not None and last.name == trainer.checkpoint_folder().name
        if self.accelerator.num_processes == 1 and step > 0 and not is_saved:
            trainer.undo_step()  # some completions may have been rewarded already
            trainer.save_checkpoint()
            last = trainer.checkpoint_folder()
        if last is None:
            return "There is no checkpoint yet"
        return f"Start it again, and --resume_from_checkpoint {last} goes on"

    # What the samples are to the losses and logs

    def sequences(self, rollouts: list[Rollout]) -> list[Sequence]:
        """The rollouts as training sequences."""
        return [rollout.sequence(self.trainer.shares_prefixes) for rollout in rollouts]

    def sampler_logprobs(self, rollouts: list[Rollout], sequences: list[Sequence]) -> list[Tensor]:
        """The engine's log-probabilities of each rollout's branch, shifted as in `Batch`."""
        device = self.accelerator.device
        return [
            shift([([0.0] * len(rollout.prompt_ids) + rollout.logprobs)[sequence.prefix :]], device)
            for rollout, sequence in zip(rollouts, sequences, strict=True)
        ]

    def record_correction(self, values: dict[str, Tensor]) -> None:
        """Logs the metrics of `rlkernels.policy_loss` about the engine's weights, as means over tokens."""
        if self.args.importance_sampling_correction:
            weight, metrics = values["num_tokens"], self.trainer.metrics
            metrics.add("sampling/importance_sampling_ratio/mean", values["sampler_weight"], weight)
            metrics.add("sampling/importance_sampling_ratio/capped", values["sampler_capped"], weight)

    def record(self, outcomes: Tensor) -> None:
        """Logs rewards and lengths, from `Samples.outcomes`."""
        record(outcomes, self.rewards.names, self.reward_weights, self.trainer.metrics)

    def show(self, samples: Samples, advantages: list[float]) -> None:
        """These are the latest completions, on all processes."""
        self.latest.rows = samples.table(self.rewards.names, advantages)
        self.latest.step = self.trainer.state.global_step

    # Evaluation

    def eval_sampler(self, eval_dataset: Any) -> GroupSampler:
        return GroupSampler(len(eval_dataset), 1, self.num_generations_eval, 1, seed=None, epoch=lambda: 0)

    def evaluate(self, dataloader: DataLoader) -> int:
        """Samples completions of the evaluation prompts, logs their rewards and lengths, and returns how many there
        are. There is no loss."""
        trainer = self.trainer
        batches: list[Tensor] = []
        for rows in dataloader:
            first = sum(map(len, batches))
            numbers = [first + row for row in self.own_rows(len(rows))]
            batches.append(self.collect(rows, numbers, step=-1).outcomes(self.accelerator))
            trainer.control = trainer.callback_handler.on_prediction_step(self.args, trainer.state, trainer.control)
        # Past its end the sampler starts over, to give every process a full batch.
        count = len(dataloader.dataset) * self.num_generations_eval  # type: ignore[arg-type]
        outcomes = torch.cat(batches)[:count]
        self.record(outcomes)
        return len(outcomes)

    # In a checkpoint: what was sampled ahead

    def state_dict(self) -> list[dict[str, Any]] | None:
        return self.ahead.state_dict(self.trainer.state.global_step) or None

    def load_state_dict(self, state: list[dict[str, Any]] | None) -> None:
        changed = self.trainer.changed
        if state is not None and changed:
            logger.warning(
                f"what {self.trainer.resumed_from} holds of completions sampled ahead is sampled anew: it is of "
                f"another {', '.join(changed)}"
            )
        self.ahead.load_state_dict([] if state is None or changed else state)
