"""What the trainers share: `BaseTrainer`, `OnlineTrainer`, metrics, loading and checking what they are given."""

import contextlib
import copy
import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate.utils import gather_object, set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, Trainer
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import logging

import rlkernels

from .configs import BaseConfig, GRPOConfig
from .rewards import RewardFunction, RewardFunctions
from .rollout import IGNORE, CompletionSampler, decode, encode, end_tokens, is_chat

logger = logging.get_logger(__name__)

# Columns of a dataset that reward functions get under another name, or that would hide what was sampled.
RESERVED = ("prompt", "completion", "completion_ids")


def load_model(path: str, kwargs: Any) -> PreTrainedModel:
    """A causal language model from a folder, or by name from the local Hugging Face cache; float32 unless asked."""
    if not Path(path).is_dir():
        from huggingface_hub import constants, try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            cached = isinstance(try_to_load_from_cache(path, "config.json"), str)
        except HFValidationError:
            cached = False
        if not cached:
            raise FileNotFoundError(
                f"model '{path}': there is no such folder, nor a model of that name in {constants.HF_HUB_CACHE}"
            )
    elif not (Path(path) / "config.json").is_file():
        raise FileNotFoundError(f"model '{path}': the folder has no config.json")
    options: dict[str, Any] = {"dtype": torch.float32, "local_files_only": True} | (kwargs or {})
    return AutoModelForCausalLM.from_pretrained(path, **options)


def load_tokenizer(model: PreTrainedModel) -> PreTrainedTokenizerBase:
    path = model.config._name_or_path
    if not path:
        raise ValueError("processing_class: a model given in memory needs its tokenizer; got None")
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"processing_class: no tokenizer could be loaded from '{path}': {reason}") from error


def check_columns(name: str, dataset: Any, *columns: str) -> None:
    if isinstance(dataset, dict) or not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise TypeError(f"{name} must be a sequence of rows; got {type(dataset).__name__}")
    if len(dataset) == 0:
        raise ValueError(f"{name} is empty")
    present = list(getattr(dataset, "column_names", None) or dataset[0])
    for column in columns:
        if column not in present:
            raise ValueError(f"{name} has no column '{column}'; its columns are {', '.join(present)}")


@contextlib.contextmanager
def isolated_rng(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers inside come from `seed`; the streams outside do not notice."""
    python, numpy = random.getstate(), np.random.get_state()
    on_cpu = device.type == "cpu"
    with torch.random.fork_rng([] if on_cpu else [device], device_type="cuda" if on_cpu else device.type):
        set_seed(seed, device_specific=True)
        yield
    random.setstate(python)
    np.random.set_state(numpy)


def completion_logprobs(model: nn.Module, batch: dict[str, Any], temperature: float) -> Tensor:
    """log p of each completion token of `rollout.lay_out`, float32 [B, T]; 0 at padding. The model is one that
    `needs_no_logits`: only what predicts a completion's tokens meets the LM head, and logits are never stored."""
    options = {"temperature": temperature, "num_scored": batch["num_scored"], "return_entropy": False}
    output = _forward(model, batch, return_token_logprobs=True, logprob_options=options)
    return output.token_logprobs[:, _prompt_length(batch) :]


def completion_policy_loss(
    model: nn.Module, batch: dict[str, Any], temperature: float, old_logprobs: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    """policy_loss of the same log-probabilities and their entropy; the gradients of the LM head are made on the way."""
    before = _prompt_length(batch)

    def loss(hidden: Tensor, weight: Tensor, token_ids: Tensor, **head: Any) -> tuple[Tensor, Tensor]:
        if head["adapter"] is not None:
            head["adapter"] = (head["adapter"][0][:, before:], head["adapter"][1])
        return rlkernels.linear_policy_loss(
            hidden[:, before:],
            weight,
            token_ids[:, before:],
            old_logprobs,
            batch["advantages"],
            batch["mask"],
            temperature=temperature,
            num_scored=batch["num_scored"],
            **head,
            **options,
        )

    return _forward(model, batch, head_function=loss).head_output


def _forward(model: nn.Module, batch: dict[str, Any], **options: Any) -> Any:
    return model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        position_ids=batch["position_ids"],
        shift_labels=nn.functional.pad(batch["completion_ids"], (_prompt_length(batch), 0), value=IGNORE),
        use_cache=False,
        **options,
    )


def _prompt_length(batch: dict[str, Any]) -> int:
    return batch["input_ids"].shape[1] - batch["completion_ids"].shape[1]


def needs_no_logits(model: nn.Module) -> bool:
    """Wraps the model's LM head, if it can."""
    try:
        rlkernels.wrap_lm_head(model)
    except ValueError as error:
        logger.warning(f"Logits are stored: {error}")
        return False
    return True


def completion_logprobs_from_logits(model: nn.Module, batch: dict[str, Any], temperature: float) -> Tensor:
    """The same, for any other model; positions of completions alone meet the LM head."""
    logits = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        position_ids=batch["position_ids"],
        logits_to_keep=batch["completion_ids"].shape[1],
        use_cache=False,
    ).logits
    logprobs = rlkernels.token_logprobs(
        logits,
        batch["completion_ids"],
        temperature=temperature,
        ignore_index=IGNORE,
        inplace_backward=logits.requires_grad,
    )
    return cast(Tensor, logprobs)  # with return_entropy it would be a pair


class GroupSampler(Sampler[int]):
    """Indices of prompts, each `num_generations` times in a row; each run of `prompts` prompts `repeats` times over.

    The order of an epoch depends on the seed and the epoch alone, so that a resumed run sees what the first would have.
    """

    def __init__(
        self, size: int, prompts: int, num_generations: int, repeats: int, seed: int | None, epoch: Callable[[], int]
    ) -> None:
        self.size, self.prompts, self.num_generations, self.repeats = size, prompts, num_generations, repeats
        self.seed, self.epoch = seed, epoch

    def __len__(self) -> int:
        return self.size // self.prompts * self.prompts * self.num_generations * self.repeats

    def __iter__(self) -> Iterator[int]:
        order = list(range(self.size))
        if self.seed is not None:
            order = torch.randperm(
                self.size, generator=torch.Generator().manual_seed(self.seed + self.epoch())
            ).tolist()
        for start in range(0, self.size - self.prompts + 1, self.prompts):
            chunk = order[start : start + self.prompts]
            for _ in range(self.repeats):
                for index in chunk:
                    yield from [index] * self.num_generations


class Metrics:
    """Weighted means of what was recorded since the last log. Values stay on their device until then."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.sums: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor | float, weight: Tensor | float = 1.0) -> None:
        """A NaN value counts for nothing."""
        value = torch.as_tensor(value, dtype=torch.float32, device=self.device)
        weight = torch.as_tensor(weight, dtype=torch.float32, device=self.device) * ~value.isnan()
        pair = torch.stack([value.nan_to_num(0.0) * weight, weight])
        self.sums[name] = self.sums[name] + pair if name in self.sums else pair

    def flush(self, accelerator: Any) -> dict[str, float]:
        """Means over all processes. Names may differ between them: a reward function logs what it likes."""
        names = sorted(set(gather_object(list(self.sums)))) if accelerator.num_processes > 1 else list(self.sums)
        if not names:
            return {}
        nothing = torch.zeros(2, device=self.device)
        sums = accelerator.reduce(torch.stack([self.sums.get(name, nothing) for name in names])).tolist()
        self.sums.clear()
        return {name: total / weight for name, (total, weight) in zip(names, sums, strict=True) if weight}


class BaseTrainer(Trainer):
    """`transformers.Trainer`, in which one batch of the dataloader is one optimizer step.

    A subclass turns a batch into micro-batches (`micro_batches`) and a micro-batch into its share of the step's loss
    (`compute_loss`), already divided by what the whole step is normalised with. The Trainer itself accumulates nothing:
    its `args.gradient_accumulation_steps` is 1, and the given number is `self.accumulation_steps`.
    """

    args: BaseConfig

    def __init__(self, model: PreTrainedModel, args: BaseConfig, **kwargs: Any) -> None:
        self.accumulation_steps = args.gradient_accumulation_steps
        args = copy.copy(args)
        args.gradient_accumulation_steps = 1
        # Batches are lists of rows of the dataset; there is nothing to collate before they are tokenised.
        super().__init__(model=model, args=args, data_collator=list, **kwargs)
        if args.n_gpu > 1:
            raise ValueError(
                "several GPUs in one process are not supported: launch with torchrun or accelerate, or make one visible"
            )
        self.metrics = Metrics(self.accelerator.device)
        # Ranks must not sample the same completions.
        set_seed(args.seed, device_specific=True)

    def micro_batches(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The micro-batches of one optimizer step; every process must return equally many, at least one."""
        raise NotImplementedError

    def training_step(
        self, model: nn.Module, inputs: list[dict[str, Any]], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        model.train()
        if callable(getattr(self.optimizer, "train", None)):  # schedule-free optimizers
            self.optimizer.train()
        batches = self.micro_batches(inputs)
        total = torch.zeros((), device=self.accelerator.device)
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                loss = self.compute_loss(model, batch)
                self.accelerator.backward(loss)
            total += loss.detach()
        return total

    def most_on_any_process(self, count: int) -> int:
        if self.accelerator.num_processes == 1:
            return count
        return int(self.accelerator.gather(torch.tensor([count], device=self.accelerator.device)).max())

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Sampling in evaluation has a stream of random numbers of its own, the same in each evaluation."""
        with isolated_rng(self.args.seed, self.accelerator.device):
            return super().evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # a training log, not an evaluation's or the final summary
            logs.update(self.metrics.flush(self.accelerator), num_tokens=self.state.num_input_tokens_seen)
        super().log(logs, start_time)

    def get_total_train_batch_size(self, args: BaseConfig) -> int:
        return super().get_total_train_batch_size(args) * self.accumulation_steps

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # the Trainer's estimate needs tokenised inputs

    def _track_num_input_tokens(self, inputs: Any) -> None:
        pass  # counted where the tokens are made

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["prompt"]


@dataclass
class Samples:
    """Completions of one batch of rows on this process, a list entry per row."""

    prompts: list
    prompt_ids: list[list[int]]
    completions: list
    completion_ids: list[list[int]]
    ended: list[bool]  # by itself, not at max_completion_length
    rewards: Tensor  # [rows, reward functions], NaN where one does not apply
    extra: dict[str, list]  # columns that reward functions logged


class OnlineTrainer(BaseTrainer):
    """A trainer that learns from rewards of the model's own completions."""

    args: GRPOConfig

    def __init__(
        self,
        model: PreTrainedModel,
        reward_funcs: RewardFunction | list[RewardFunction],
        args: GRPOConfig,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ) -> None:
        self.rewards = RewardFunctions(reward_funcs if isinstance(reward_funcs, list | tuple) else [reward_funcs])
        count = len(self.rewards.names)
        weights = [1.0] * count if args.reward_weights is None else args.reward_weights
        if len(weights) != count:
            raise ValueError(f"reward_weights must have one entry per reward function, {count}; got {len(weights)}")
        if eval_dataset is not None:
            parts = eval_dataset.items() if isinstance(eval_dataset, dict) else [("", eval_dataset)]
            for key, part in parts:
                check_columns(f"eval_dataset['{key}']" if key else "eval_dataset", part, "prompt")
        tokenizer = processing_class or load_tokenizer(model)
        super().__init__(model, args, eval_dataset=eval_dataset, processing_class=tokenizer, **kwargs)
        self.reward_weights = torch.tensor(weights, dtype=torch.float32, device=self.accelerator.device)
        self.num_generations_eval = args.num_generations_eval or args.num_generations
        end_token_ids = end_tokens(model, tokenizer)
        padding = [token for token in (tokenizer.pad_token_id, *end_token_ids, 0) if token is not None]
        self.sampler = CompletionSampler(
            end_token_ids=end_token_ids,
            pad_token_id=padding[0],
            max_new_tokens=args.max_completion_length,
            temperature=args.temperature,
        )

    def sample(self, inputs: list[dict[str, Any]], metrics: Metrics) -> Samples:
        prompts = [row["prompt"] for row in inputs]
        prompt_ids = encode(self.processing_class, prompts, self.args.chat_template_kwargs)
        # One autocast context around all of generate(): inside it each weight is cast to bfloat16 once, not per token.
        with self.accelerator.autocast():
            completion_ids = self.sampler(self.model, prompt_ids)
        completions = decode(self.processing_class, completion_ids, is_chat(prompts[0]))
        extra: dict[str, list] = defaultdict(list)
        columns = {name: [row[name] for row in inputs] for name in inputs[0] if name not in RESERVED}
        rewards = self.rewards(
            {**columns, "prompts": prompts, "completions": completions, "completion_ids": completion_ids},
            trainer_state=self.state,
            log_extra=lambda column, values: extra[column].extend(values),
            log_metric=metrics.add,
        )
        return Samples(
            prompts=prompts,
            prompt_ids=prompt_ids,
            completions=completions,
            completion_ids=completion_ids,
            ended=[ids[-1] in self.sampler.end_token_ids for ids in completion_ids],
            rewards=rewards.to(self.accelerator.device),
            extra=extra,
        )

    def gather_outcomes(self, samples: Samples) -> Tensor:
        """Of all processes, [rows, functions + 2]: the rewards, the completion's length, whether it ended."""
        device = self.accelerator.device
        lengths = torch.tensor([[float(len(ids))] for ids in samples.completion_ids], device=device)
        ended = torch.tensor([[float(ended)] for ended in samples.ended], device=device)
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

    def _get_eval_sampler(self, eval_dataset: Any) -> GroupSampler:
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
        batches = []
        for inputs in dataloader:
            batches.append(self.gather_outcomes(self.sample(inputs, metrics)))
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        # Past its end the sampler starts over, to give every process a full batch.
        count = len(dataloader.dataset) * self.num_generations_eval  # type: ignore[arg-type]
        outcomes = torch.cat(batches)[:count]
        self.record_outcomes(outcomes, metrics)
        values = {f"{metric_key_prefix}_{name}": value for name, value in metrics.flush(self.accelerator).items()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=values, num_samples=len(outcomes))
