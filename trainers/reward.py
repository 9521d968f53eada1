"""Reward models from pairs (Bradley and Terry 1952; Ouyang et al. 2022, arXiv 2203.02155)."""

import copy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    set_seed,
)

import rlkernels

from .base.config import BaseConfig, share_prefixes_field
from .base.limits import Limits
from .base.loading import disable_dropout, load_model, load_tokenizer, refuse_prompt_learning, set_pad_token
from .base.rows import each_part
from .base.trainer import BaseTrainer
from .batch.batch import Batch, num_run
from .batch.packing import fill
from .batch.scoring import score_head, token_scores
from .data import prepare, reward_pair, sequences_of


@dataclass(repr=False)
class RewardConfig(BaseConfig):
    """Options of `RewardTrainer`."""

    learning_rate: float = field(default=1e-4, metadata={"help": "The initial learning rate of AdamW."})
    disable_dropout: bool = field(default=True, metadata={"help": "Train without dropout."})
    dataset_num_proc: int | None = field(
        default=None, metadata={"help": "Number of processes that tokenize the dataset; this process alone if unset."}
    )
    max_length: int | None = field(
        default=1024, metadata={"help": "Longest sequence in tokens. Pairs with a longer one are left out."}
    )
    share_prefixes: str = share_prefixes_field()
    center_rewards_coefficient: float | None = field(
        default=None,
        metadata={"help": "Weight of (chosen + rejected)^2 in the loss, which keeps scores near 0. 0.01 works well."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"max_length must be at least 1; got {self.max_length}")


@dataclass(frozen=True, kw_only=True, eq=False)
class RewardBatch(Batch):
    """The chosen sequences of P pairs, then the rejected ones: S = 2 P sequences.

    margin   float32 [P]: by how much each chosen sequence is known to be better
    """

    margin: Tensor


class RewardTrainer(BaseTrainer):
    """Trains a sequence classifier with one label to score a chosen sequence above a rejected one.

        loss = mean over pairs of -log sigmoid(chosen - rejected - margin)     (`rlkernels.reward_pair_loss`)

    The score of a sequence is that of its last token. Chosen and rejected sequences of a micro-batch run as one packed
    batch, in which what a pair begins with runs once (`share_prefixes`). Logged, in evaluation too: `accuracy` (the
    share of pairs whose chosen sequence scores higher), `margin` (chosen - rejected), and `min_reward`, `mean_reward`
    and `max_reward` over all scores.

    Args:
        model: a folder, the name of a model in the local Hugging Face cache, or a classifier in memory. A causal
            language model in a folder or by name gets a new score head, drawn with `args.seed`.
        args: the config; `RewardConfig()` if None.
        train_dataset: rows with `chosen` and `rejected`, text or messages, and a `prompt` unless both start with it.
            A further column `margin` says by how much chosen is known to be better.
        eval_dataset: the same, or a dict of several.
        processing_class: the tokenizer; the model's own if None.
        peft_config: a config of PEFT: adapters and the score head alone are trained and saved.
        callbacks, optimizers: as in `transformers.Trainer`.
    """

    args: RewardConfig
    auto_class = AutoModelForSequenceClassification

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: RewardConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        peft_config: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
    ) -> None:
        args = RewardConfig() if args is None else args
        refuse_prompt_learning("peft_config", peft_config)
        if peft_config is not None and peft_config.task_type is None:
            # With this task PEFT trains and saves the score head too.
            peft_config = copy.copy(peft_config)
            peft_config.task_type = "SEQ_CLS"
        # The Trainer makes the output folder, so the dataset is looked at before.
        model = self.load(model, args)
        tokenizer = processing_class or load_tokenizer(model, args)
        self.prepared = partial(
            prepare,
            tokenize=partial(reward_pair, tokenizer, max_length=args.max_length),
            tokenizer=tokenizer,
            columns=("chosen", "rejected"),
            keep=("margin",),
            limits=Limits.of(model),
            num_proc=args.dataset_num_proc,
        )
        super().__init__(
            model,
            args,
            train_dataset=self.prepared("train_dataset", train_dataset),
            eval_dataset=each_part(eval_dataset, self.prepared),
            processing_class=processing_class,
            peft_config=peft_config,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if args.disable_dropout:
            disable_dropout(self.model)
        set_pad_token(self.model, self.processing_class)

    def load(self, model: str | PreTrainedModel, args: BaseConfig) -> PreTrainedModel:
        if isinstance(model, str):
            set_seed(args.seed)
            model = load_model(model, args, self.auto_class, new="score", num_labels=1)
        refuse_prompt_learning("peft_config of the model", model)
        score_head(model)
        if model.config.num_labels != 1:
            raise ValueError(f"model must have one label, num_labels=1; got {model.config.num_labels}")
        return model

    # Data

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self.prepared("eval_dataset", eval_dataset)
        return super().get_eval_dataloader(eval_dataset)

    def micro_batches(self, inputs: list[dict[str, Any]]) -> list[Batch]:
        if self.model.training:
            self.add_tokens_seen(sum(row["num_tokens"] for row in inputs))
        pairs = [sequences_of(row, self.shares_prefixes) for row in inputs]
        margins = torch.tensor([row["margin"] or 0.0 for row in inputs], dtype=torch.float32)
        batches: list[Batch] = []
        for chunk in fill(map(num_run, pairs), self.args.token_budget):
            sequences = [sequence for side in zip(*(pairs[index] for index in chunk), strict=True) for sequence in side]
            margin = margins[chunk].to(self.accelerator.device)
            batches.append(self.lay_out(sequences, RewardBatch, margin=margin, normalizer=len(inputs)))
        return self.even_out(batches)

    def compute_loss(self, model: nn.Module, batch: RewardBatch) -> Tensor:
        scores = batch.last(token_scores(model, batch)).float()
        chosen, rejected = scores.chunk(2)
        loss, values = rlkernels.reward_pair_loss(chosen, rejected, batch.margin)
        if self.args.center_rewards_coefficient is not None:
            loss = loss + self.args.center_rewards_coefficient * (chosen + rejected).square().mean()
        scores = scores.detach()
        names = (*rlkernels.reward_pair_loss.metrics, "mean_reward")  # type: ignore[attr-defined]
        for name, value in zip(names, (*values, scores.mean()), strict=True):
            self.metrics.add(name, value, len(chosen))
        self.metrics.add_range("reward", scores)
        return loss * (len(chosen) / batch.normalizer)
