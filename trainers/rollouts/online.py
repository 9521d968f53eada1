"""What PPO and GRPO share: completions of the model itself, and their rewards."""

import dataclasses
import functools
import hashlib
import json
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import logging

from ..base import checkpoints
from ..base.chat import is_chat
from ..base.config import BaseConfig
from ..base.contexts import isolated_rng
from ..base.kept import State
from ..base.limits import Limits
from ..base.loading import load_classifier
from ..base.metrics import LOGGED, Metrics, unique
from ..base.rows import GroupSampler, NumberedRows, check_columns, each_part
from ..base.sharding import gathered_once
from ..base.trainer import BaseTrainer
from ..batch.batch import shift
from ..data import check_prompts
from ..rewards.calls import copied
from ..rewards.functions import RewardFunction, RewardFunctions, RewardSource
from ..rewards.model import RewardModel
from .ahead import SampledAhead
from .completions import CompletionsCallback
from .config import OnlineConfig
from .engine import Engine, Rollout, SamplingOptions, check_rollouts, decode, end_tokens
from .generate import TransformersEngine
from .vllm import ServerLost, VLLMEngine
from .weights import write_weights

logger = logging.get_logger(__name__)

# Columns of a dataset that reward functions get under another name, or that would hide what was sampled.
RESERVED = ("prompt", "completion", "completion_ids", "_row_id")
# What else reward functions get, and the trainer's own number of a row: no columns of a dataset.
REFUSED = ("prompts", "completions", "trainer_state", "log_extra", "log_metric", "_row_id")
# Columns of the table of completions, next to the rewards.
SHOWN = ("step", "prompt", "completion", "advantage")
# In a checkpoint.
COMPLETIONS = "completions.json"
# What a run may change while it still learns from the completions of before: when and by whom they are sampled and
# rewarded, what is shown of them, and what the loss makes of them.
LATER = {
    *("reward_timeout", "reward_workers", "on_reward_error", "staleness", "use_vllm", "vllm_server_base_url"),
    *("vllm_server_timeout", "vllm_request_timeout", "vllm_max_concurrency", "vllm_weights_folder"),
    *("log_completions", "num_completions_to_print", "log_unique_prompts", "num_generations_eval", "total_episodes"),
    *("importance_sampling_mode", "importance_sampling_cap", "importance_sampling_level", "use_bias_correction_kl"),
    *("epsilon", "epsilon_high", "delta", "loss_type", "sapo_temperature_neg", "sapo_temperature_pos"),
    *("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg", "top_entropy_quantile"),
    *("cliprange", "cliprange_value", "vf_coef", "adap_kl_ctrl", "target_kl", "horizon"),
}


@dataclass
class Samples:
    """Completions of one batch of rows on this process, a list entry per row."""

    prompts: list
    rollouts: list[Rollout]
    completions: list  # as reward functions see them
    rewards: Tensor  # [rows, reward functions], NaN where one does not apply
    extra: dict[str, list]  # columns that reward functions logged

    def replace(self, rows: list[int], others: "Samples") -> None:
        """Puts others in the place of these rows."""
        for name in ("prompts", "rollouts", "completions"):
            for row, value in zip(rows, getattr(others, name), strict=True):
                getattr(self, name)[row] = value
        self.rewards[rows] = others.rewards
        for column, values in others.extra.items():
            own = self.extra.setdefault(column, [])
            own += [None] * (len(self.prompts) - len(own))
            for row, value in zip(rows, values, strict=False):
                own[row] = value


def digest(rows: list[dict[str, Any]]) -> str:
    """A SHA-256 of what JSON can hold of them."""
    text = json.dumps(rows, default=lambda value: type(value).__name__, skipkeys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def column_of(reward: str) -> str:
    """The column of the table of completions that holds this reward."""
    return f"rewards/{reward}"


def check_prompt_columns(name: str, dataset: Any) -> None:
    check_columns(name, dataset, "prompt")
    rows = dataset if isinstance(dataset, list | tuple) else ()  # which may differ
    columns = set(getattr(dataset, "column_names", None) or dataset[0]).union(*rows)
    for column in REFUSED:
        if column in columns:
            raise ValueError(
                f"{name} has a column '{column}', the name of something else that reward functions or the trainer get; "
                "rename it"
            )


def reward_function(source: RewardSource, args: OnlineConfig) -> RewardFunction:
    if not isinstance(source, str | nn.Module):
        return source
    return RewardModel(load_classifier("reward_funcs", source, args, trained=True), args)


class OnlineTrainer(BaseTrainer):
    """A trainer that learns from rewards of the model's own completions.

    Args:
        reward_funcs: one or several functions `f(prompts=, completions=, completion_ids=, **columns, trainer_state=,
            log_extra=, log_metric=) -> list[float | None]`, plain or async, by TRL's contract; or reward models, see
            `reward_model.RewardModel`: a folder, a name in the local Hugging Face cache, or a model in memory.
        rollout: what samples the completions, see `rollout.Engine`; the trained model itself if None.
    """

    args: OnlineConfig
    #: A dataclass of what is kept of a batch of completions, on this process.
    rollouts_type: type
    #: Optimizer steps that a batch of completions serves.
    steps_per_rollout: int

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward_funcs: RewardSource | list[RewardSource],
        args: OnlineConfig,
        eval_dataset: Any = None,
        rollout: Engine | None = None,
        **kwargs: Any,
    ) -> None:
        reward_funcs = reward_funcs if isinstance(reward_funcs, list | tuple) else [reward_funcs]
        self.rewards = RewardFunctions(
            [reward_function(source, args) for source in reward_funcs],
            timeout=args.reward_timeout,
            workers=args.reward_workers,
            on_error=args.on_reward_error,
            taken=self.reward_names_taken(args),
        )
        count = len(self.rewards.names)
        weights = [1.0] * count if args.reward_weights is None else args.reward_weights
        if len(weights) != count:
            raise ValueError(f"reward_weights must have one entry per reward function, {count}; got {len(weights)}")
        check_prompt_columns("train_dataset", kwargs["train_dataset"])
        each_part(eval_dataset, check_prompt_columns)
        if rollout is not None and args.use_vllm:
            raise ValueError("rollout and use_vllm, which vllm_server_base_url sets, exclude each other; got both")
        super().__init__(model, args, eval_dataset=eval_dataset, **kwargs)
        for reward_model in self.reward_models():
            reward_model.prepare(self.accelerator, self.processing_class)
        self._check_limits(eval_dataset)
        self.reward_weights = torch.tensor(weights, dtype=torch.float32, device=self.accelerator.device)
        self.num_generations_eval = 1
        self.rollouts: Any = None
        self.rollout_rows: list[dict[str, Any]] = []  # those that they complete
        self._saved_rows: str | None = None  # the digest of those of a checkpoint, before they are looked at
        self._changed: list[str] = []  # what a checkpoint's rollouts are not of
        #: The latest completions over all processes, a dict each: for callbacks that show or save them.
        self.completions: list[dict[str, Any]] = []
        #: The steps that were taken when they were sampled.
        self.completions_step = 0
        self.sampling = SamplingOptions(
            temperature=args.temperature,
            max_completion_length=args.max_completion_length,
            logprobs=args.importance_sampling_correction,
            seed=args.seed,
        )
        self.engine = self._engine() if rollout is None else rollout
        self.ahead = SampledAhead()
        if args.staleness and not self._has_own_weights:
            raise ValueError(
                "staleness 1 needs an engine with weights of its own (update_weights), such as that of "
                f"vllm_server_base_url; got {type(self.engine).__name__}"
            )
        self.sent_step: int | None = None  # the step whose weights the engine has
        self._keep_completions()
        if args.log_completions:
            self.add_callback(CompletionsCallback(self))

    def reward_names_taken(self, args: Any) -> Sequence[str]:
        """Names of rewards that the trainer itself logs."""
        return ()

    def read_by(self) -> list[Any]:
        """The models that read prompts and completions, in the policy's tokens."""
        reference = [] if self.reference_model is None else [self.accelerator.unwrap_model(self.reference_model)]
        models = [each.model for each in self.reward_models() if each.own_tokenizer is None]
        return [self.generating_model(), *reference, *models]

    def reward_models(self) -> list[RewardModel]:
        return [function for function in self.rewards.functions if isinstance(function, RewardModel)]

    def _check_limits(self, eval_dataset: Any) -> None:
        """Before anything is sampled, whether the models can read the prompts and what may follow."""
        tokenizer, completion = self.processing_class, self.args.max_completion_length
        self.limits = Limits.of(*self.read_by())
        config = self.generating_model().config.get_text_config(decoder=True)
        self.vocab_size = min(config.vocab_size, self.limits.vocab_size)
        ends = end_tokens(self.generating_model(), tokenizer)
        if ends and min(ends) >= self.limits.vocab_size:
            raise ValueError(
                f"processing_class: its end-of-sequence token is {min(ends)}, beyond the {self.limits.vocab_size} rows "
                "of the model's embedding, so that no completion could end; resize_token_embeddings makes room"
            )
        others = [model.check_prompt for model in self.reward_models() if not model.fits]
        parts = eval_dataset if isinstance(eval_dataset, dict) else {"": eval_dataset}
        named = {f"eval_dataset['{key}']" if key else "eval_dataset": part for key, part in parts.items()}
        for name, dataset in {"train_dataset": self.train_dataset, **named}.items():
            if dataset is not None:
                check_prompts(name, dataset, tokenizer, self.limits, completion, self.args.chat_template_kwargs, others)

    def generating_model(self) -> Any:
        return self.model

    def _engine(self) -> Engine:
        args, model, tokenizer = self.args, self.generating_model(), self.processing_class
        if not args.use_vllm:
            return TransformersEngine(model, tokenizer, args.chat_template_kwargs)
        return VLLMEngine(
            model,
            tokenizer,
            args.vllm_server_base_url,
            args.vllm_weights_folder or Path(args.output_dir) / "vllm_weights",
            chat_template_kwargs=args.chat_template_kwargs,
            timeout=args.vllm_server_timeout,
            request_timeout=args.vllm_request_timeout,
            max_concurrency=args.vllm_max_concurrency,
        )

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self.ahead, self.sent_step = SampledAhead(), None
        try:
            return super().train(*args, **kwargs)
        finally:
            self.sent_step = None  # the best weights may have been loaded
            self.rewards.close()

    def roll_out(self, inputs: list[dict[str, Any]]) -> Any:
        """Completes a batch of prompts: all that the steps on it learn from."""
        raise NotImplementedError

    def current_rollouts(self, inputs: list[dict[str, Any]]) -> tuple[Any, int]:
        """The completions that this optimizer step learns from, and how many steps have learned from them."""
        step = self.state.global_step % self.steps_per_rollout
        if self._saved_rows is not None:
            found = [self._saved_rows != digest(inputs) or len(self.rollouts.input_ids) != len(inputs)]
            if self.accelerator.num_processes > 1:
                found = gather_object(found)
            if any(found):
                self.rollouts, self._changed = None, ["rows of train_dataset"]
            self._saved_rows = None
        if step == 0 or self.rollouts is None:
            if step:
                why = f"those of the checkpoint are of another {', '.join(self._changed)}"
                logger.warning(
                    f"step {self.state.global_step + 1}: this step's prompts are completed anew, since "
                    f"{why if self._changed else 'the checkpoint holds no completions for it'}"
                )
            with self.stop.while_doing("sampling completions and their rewards"):
                self.rollouts, self.completions_step = self.roll_out(inputs), self.state.global_step
            self.rollout_rows = inputs
        return self.rollouts, step

    def settings(self) -> dict[str, Any]:
        own, others = ({each.name for each in dataclasses.fields(config)} for config in (self.args, BaseConfig))
        names = ["seed", "bf16", "fp16", *sorted(own - others - LATER)]
        shaping = {name: getattr(self.args, name) for name in names}
        return {**super().settings(), **shaping, "reward_funcs": self.rewards.names}

    def own_rows(self, count: int) -> range:
        """The numbers, among those of all processes, of a batch of so many rows on each."""
        first = self.accelerator.process_index * count
        return range(first, first + count)

    def sample(
        self, inputs: list[dict[str, Any]], metrics: Metrics, rows: Iterable[int] | None = None, step: int | None = None
    ) -> Samples:
        """Completions of these rows of the dataset, and their rewards. What is sampled depends on the number of each
        row, by default its place among those of all processes, and on the step, by default the current one."""
        prompts = [row["prompt"] for row in inputs]
        options = dataclasses.replace(
            self.sampling,
            step=self.state.global_step if step is None else step,
            rows=tuple(self.own_rows(len(inputs)) if rows is None else rows),
        )
        try:
            if rows is None:
                rollouts = self._complete_batch([row.get("_row_id") for row in inputs], prompts, options)
            else:
                self.update_weights()
                rollouts = self.complete(prompts, options)
        except ServerLost as error:
            raise ServerLost(f"{error}. {self._kept(options.step)}") from error
        completion_ids = [rollout.completion_ids for rollout in rollouts]
        completions = decode(self.processing_class, completion_ids, is_chat(prompts[0]))
        extra: dict[str, list] = {}
        columns = {name: [row[name] for row in inputs] for name in inputs[0] if name not in RESERVED}

        def log_extra(column: str, values: list) -> None:
            extra[unique(column, {*SHOWN, *map(column_of, self.rewards.names), *extra})] = values

        def log_metric(name: str, value: float, weight: float) -> None:
            metrics.add(name if name in self.rewards.metrics else LOGGED + name, value, weight)

        # Their random numbers are others than the training's, which a function that seeds would make repeat themselves.
        seed = random.Random(f"{self.args.seed} {options.step} {options.rows}").getrandbits(30)
        with isolated_rng(seed, self.accelerator.device):
            rewards = self.rewards(
                {**columns, "prompts": prompts, "completions": completions, "completion_ids": completion_ids},
                trainer_state=self.state,
                log_extra=log_extra,
                log_metric=log_metric,
            )
        return Samples(prompts, rollouts, completions, rewards.to(self.accelerator.device), extra)

    def complete(self, prompts: list, options: SamplingOptions) -> list[Rollout]:
        # One autocast context around all of generate(): inside it each weight is cast to bfloat16 once, not per token.
        with self.accelerator.autocast(), gathered_once(self.accelerator, self.model):
            return self._checked(self.run_engine, prompts, options)

    def _checked(self, engine: Engine, prompts: list, options: SamplingOptions) -> list[Rollout]:
        return check_rollouts(engine(prompts, options), prompts, options, self.vocab_size)

    def run_engine(self, prompts: list, options: SamplingOptions) -> list[Rollout]:
        return self.engine(prompts, options)

    def _complete_batch(self, row_ids: list, prompts: list, options: SamplingOptions) -> list[Rollout]:
        """The completions of a batch to learn from; with staleness, those of the next one are begun."""
        rollouts = self.ahead.take(options.step, row_ids, prompts)
        is_older = rollouts is not None
        self.update_weights()
        if rollouts is None:
            rollouts = self.complete(prompts, options)
        if self.args.staleness:
            self.metrics.add("sampling/staleness", is_older)
        step = options.step + self.steps_per_rollout
        if self.args.staleness and step < self.state.max_steps:
            sampler: Any = self.train_sampler()
            order = sampler.of_step(step)
            dataset = NumberedRows(self.train_dataset)
            rows = [dataset[order[row]] for row in self.own_rows(len(prompts))]
            coming = dataclasses.replace(options, step=step)
            engine = functools.partial(self._checked, self.engine)
            self.ahead.start(engine, [row["_row_id"] for row in rows], [row["prompt"] for row in rows], coming)
        return rollouts

    @property
    def _has_own_weights(self) -> bool:
        return getattr(self.engine, "update_weights", None) is not None

    def update_weights(self) -> None:
        """Gives an engine with weights of its own those of now, unless it has them. Every process calls it."""
        if not self._has_own_weights or self.sent_step == self.state.global_step:
            return
        # What is sampled ahead is by one set of weights, on every process.
        self.ahead.wait()
        self.accelerator.wait_for_everyone()

        def save(folder: Path) -> None:
            write_weights(folder, self.generating_model(), self.model_wrapped, self.accelerator)

        self.engine.update_weights(save, self.state.global_step)  # type: ignore[attr-defined]
        self.sent_step = self.state.global_step

    def _kept(self, step: int) -> str:
        """What is left of a run whose engine is gone, and how it goes on."""
        # Several processes may not have lost it all, and would not save together; evaluation has other random numbers.
        last = checkpoints.last_checkpoint(Path(self.args.output_dir))
        is_saved = last is not None and last.name == self.checkpoint_folder().name
        if self.accelerator.num_processes == 1 and step > 0 and not is_saved:
            self.undo_step()  # of which some completions may have been rewarded already
            self.save_checkpoint()
            last = self.checkpoint_folder()
        if last is None:
            return "There is no checkpoint yet"
        return f"Start it again, and --resume_from_checkpoint {last} goes on"

    def sampler_logprobs(self, rollouts: list[Rollout]) -> list[Tensor]:
        """Laid out and shifted, as in `packing.lay_out`."""
        device = self.accelerator.device
        return [shift([[0.0] * len(rollout.prompt_ids) + rollout.logprobs], device) for rollout in rollouts]

    def record_correction(self, values: dict[str, Tensor]) -> None:
        """Of the metrics of `rlkernels.policy_loss`, means over tokens."""
        if self.args.importance_sampling_correction:
            weight = values["num_tokens"]
            self.metrics.add("sampling/importance_sampling_ratio/mean", values["sampler_weight"], weight)
            self.metrics.add("sampling/importance_sampling_ratio/capped", values["sampler_capped"], weight)

    def gather_outcomes(self, samples: Samples) -> Tensor:
        """Of all processes, [rows, functions + 2]: the rewards, the tokens of the completion that are the model's, and
        whether it ended."""
        device = self.accelerator.device
        lengths = torch.tensor([[float(sum(rollout.own))] for rollout in samples.rollouts], device=device)
        ended = torch.tensor([[float(rollout.ended)] for rollout in samples.rollouts], device=device)
        return self.accelerator.gather(torch.cat([samples.rewards, lengths, ended], 1))

    def record_outcomes(self, outcomes: Tensor, metrics: Metrics) -> None:
        rewards, lengths, ended = outcomes[:, :-2], outcomes[:, -2], outcomes[:, -1]
        metrics.add("completions/mean_length", lengths.mean())
        metrics.add("completions/min_length", lengths.min())
        metrics.add("completions/max_length", lengths.max())
        metrics.add("completions/clipped_ratio", 1 - ended.mean())

        def std(values: Tensor) -> Tensor | float:
            return values.std() if len(values) > 1 else math.nan

        for name, column in zip(self.rewards.names, rewards.T, strict=True):
            applies = column[~column.isnan()]
            metrics.add(f"rewards/{name}/mean", applies.mean())
            metrics.add(f"rewards/{name}/std", std(applies))
        total = (rewards * self.reward_weights).nansum(1)[~rewards.isnan().all(1)]
        metrics.add("reward", total.mean())
        metrics.add("reward_std", std(total))

    def table(self, samples: Samples, advantages: list[float]) -> list[dict[str, Any]]:
        """Of all processes, what there is to show of each completion."""
        rewards = zip(*samples.rewards.T.tolist(), strict=True)
        rows = [
            {
                "prompt": copied(samples.prompts[row]),
                "completion": samples.completions[row],
                **{column_of(name): reward for name, reward in zip(self.rewards.names, values, strict=True)},
                "advantage": advantages[row],
                **{column: logged[row] for column, logged in samples.extra.items() if row < len(logged)},
            }
            for row, values in enumerate(rewards)
        ]
        return gather_object(rows)

    def count_tokens(self, rollouts: list[Rollout]) -> None:
        self.add_tokens_seen(sum(len(rollout.prompt_ids) + len(rollout.completion_ids) for rollout in rollouts))

    def eval_sampler(self, eval_dataset: Any) -> GroupSampler:
        return GroupSampler(len(eval_dataset), 1, self.num_generations_eval, 1, seed=None, epoch=lambda: 0)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Samples completions of the evaluation prompts and reports their rewards and lengths; there is no loss."""
        metrics = Metrics(self.accelerator.device)
        batches: list[Tensor] = []
        for inputs in dataloader:
            first = sum(map(len, batches))
            rows = [first + row for row in self.own_rows(len(inputs))]
            batches.append(self.gather_outcomes(self.sample(inputs, metrics, rows, step=-1)))
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        # Past its end the sampler starts over, to give every process a full batch.
        count = len(dataloader.dataset) * self.num_generations_eval  # type: ignore[arg-type]
        outcomes = torch.cat(batches)[:count]
        self.record_outcomes(outcomes, metrics)
        values = {f"{metric_key_prefix}_{name}": value for name, value in metrics.flush(self.accelerator).items()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=values, num_samples=len(outcomes))

    # Checkpoints keep the unfinished rollouts of each process, what was sampled ahead, and the completions to show.

    def _keep_completions(self) -> None:
        for file, state_dict, load_state_dict in (
            ("rollouts_{process}.pth", self._unfinished, self._load_unfinished),
            (COMPLETIONS, self._shown, self._load_shown),
            ("ahead_{process}.pth", self._sampled_ahead, self._load_sampled_ahead),
        ):
            self.keep(file, State(state_dict, load_state_dict), "its completions")
        self.undone.append(State(self._collected, self._put_back))

    def _unfinished(self) -> dict[str, Any] | None:
        if self.rollouts is None or self.state.global_step % self.steps_per_rollout == 0:
            return None
        return {"rows": digest(self.rollout_rows), "rollouts": vars(self.rollouts)}

    def _load_unfinished(self, saved: dict[str, Any] | None) -> None:
        self._changed = self.changed
        self.rollouts = self._saved_rows = None
        if saved is not None and not self._changed:
            self.rollouts, self._saved_rows = self.rollouts_type(**saved["rollouts"]), saved["rows"]

    def _shown(self) -> dict[str, Any]:
        return {"step": self.completions_step, "rows": self.completions}

    def _load_shown(self, shown: dict[str, Any] | None) -> None:
        if shown is None:
            raise FileNotFoundError(COMPLETIONS)
        self.completions, self.completions_step = shown["rows"], shown["step"]

    def _sampled_ahead(self) -> list[dict[str, Any]] | None:
        return self.ahead.state(self.state.global_step) or None

    def _load_sampled_ahead(self, ahead: list[dict[str, Any]] | None) -> None:
        if ahead is not None and self._changed:
            logger.warning(
                f"what {self.resumed_from} holds of completions sampled ahead is sampled anew: it is of another "
                f"{', '.join(self._changed)}"
            )
        self.ahead.load(ahead if ahead is not None and not self._changed else [])

    def _collected(self) -> tuple:
        return self.rollouts, self.rollout_rows, self.completions, self.completions_step

    def _put_back(self, collected: tuple) -> None:
        self.rollouts, self.rollout_rows, self.completions, self.completions_step = collected
