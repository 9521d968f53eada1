"""Supervised fine-tuning: learning to continue text as a dataset does."""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from .base.config import BaseConfig, router_field
from .base.limits import Limits
from .base.loading import load_tokenizer, refuse_prompt_learning
from .base.rows import each_part
from .base.trainer import BaseTrainer
from .batch.batch import Batch
from .batch.packing import fill_by_length
from .data import Packed, prepare, sequences_of, supervised
from .losses.likelihood import LOSSES


@dataclass(repr=False)
class SFTConfig(BaseConfig):
    """Options of `SFTTrainer`."""

    learning_rate: float = field(default=2e-5, metadata={"help": "The initial learning rate of AdamW."})
    dataset_text_field: str = field(
        default="text", metadata={"help": "Name of the column with text, if rows are plain text."}
    )
    dataset_num_proc: int | None = field(
        default=None, metadata={"help": "Number of processes that tokenize the dataset; this process alone if unset."}
    )
    max_length: int | None = field(
        default=1024, metadata={"help": "Longest sequence in tokens. Longer ones are truncated; no limit if unset."}
    )
    truncation_mode: str = field(
        default="keep_start",
        metadata={"help": "Which end of a sequence truncation keeps.", "choices": ["keep_start", "keep_end"]},
    )
    packing: bool = field(
        default=False,
        metadata={
            "help": "Fill each of the per_device_train_batch_size places with several sequences, together at most "
            "max_length tokens, so that all optimizer steps learn from about equally many tokens. Attention does not "
            "cross sequences. If off, a place holds one row. Micro-batches have no padding in either case."
        },
    )
    completion_only_loss: bool | None = field(
        default=None,
        metadata={
            "help": "Learn from completions only. If unset, on for rows with a prompt and a completion. If false, the "
            "model learns prompts too."
        },
    )
    assistant_only_loss: bool = field(
        default=False,
        metadata={
            "help": "Learn only from what the assistant says in messages. The chat template must mark it with "
            "{%% generation %%}."
        },
    )
    router_aux_loss_coef: float | None = router_field()
    loss_type: str = field(
        default="nll",
        metadata={
            "help": "nll: negative log-likelihood. dft: the same, with each token weighted by its probability "
            "(Dynamic Fine-Tuning).",
            "choices": [*LOSSES],
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(
                f"max_length must be at least 2, so that there is a token to predict; got {self.max_length}"
            )
        if self.packing and self.train_sampling_strategy == "group_by_length":
            raise ValueError("packing and train_sampling_strategy group_by_length exclude each other; got both")
        if self.packing and self.max_length is None:
            raise ValueError("packing needs max_length; got None")


class SFTTrainer(BaseTrainer):
    """Supervised fine-tuning of a causal language model.

        nll   loss = -1/N sum_t log p(x_t | x_<t)
        dft   loss = -1/N sum_t sg(p(x_t | x_<t)) log p(x_t | x_<t),   where no gradient flows through sg(.)

    over the N tokens in the loss (`data.supervised`) of the optimizer step, on all processes and in all micro-batches
    together. Logs the loss, the mean `entropy` of these tokens' distributions, and `num_tokens`, all tokens seen so
    far. An evaluation also logs `mean_token_accuracy`, how often the token is the likeliest; in training that would
    cost one more product with the LM head.

    Args:
        model: a folder, the name of a model in the local Hugging Face cache, or a model in memory.
        args: the config; `SFTConfig()` if None.
        train_dataset: rows of any format of `data.supervised`. Rows are left out if truncation leaves them no token in
            the loss.
        eval_dataset: the same, or a dict of several.
        processing_class: the tokenizer; the model's own if None.
        peft_config: a config of PEFT, whose adapters are trained.

    References: Wu et al. 2025, "On the Generalization of SFT" (DFT, arXiv 2508.05629).
    """

    args: SFTConfig

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: SFTConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        peft_config: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
    ) -> None:
        args = SFTConfig() if args is None else args
        refuse_prompt_learning("peft_config", peft_config)
        # Before the Trainer, which makes the output folder.
        model = self.load(model, args)
        tokenizer = processing_class or load_tokenizer(model, args)
        tokenize = partial(
            supervised,
            tokenizer,
            max_length=args.max_length,
            truncation_mode=args.truncation_mode,
            completion_only_loss=args.completion_only_loss,
            assistant_only_loss=args.assistant_only_loss,
            text_field=args.dataset_text_field,
        )
        self.prepared = partial(
            prepare,
            tokenize=tokenize,
            tokenizer=tokenizer,
            limits=Limits.of(model),
            num_proc=args.dataset_num_proc,
        )
        train_dataset = self.prepared("train_dataset", train_dataset)
        super().__init__(
            model,
            args,
            train_dataset=Packed(train_dataset, args.max_length) if args.packing else train_dataset,
            eval_dataset=each_part(eval_dataset, self.prepared),
            processing_class=processing_class,
            peft_config=peft_config,
            callbacks=callbacks,
            optimizers=optimizers,
        )

    # Data

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self.prepared("eval_dataset", eval_dataset)
        return super().get_eval_dataloader(eval_dataset)

    # The optimizer step

    def micro_batches(self, inputs: list[dict[str, Any]]) -> list[Batch]:
        if self.model.training:
            self.add_tokens_seen(sum(row["num_tokens"] for row in inputs))
        parts: list[list[Batch]] = []
        for rows in self.parts(inputs):
            sequences = [sequence for row in rows for sequence in sequences_of(row)]
            chunks = fill_by_length(sequences, self.args.token_budget)
            parts.append([self.lay_out([sequences[index] for index in chunk], Batch) for chunk in chunks])
        batches = self.joined(parts)
        normalizer = float(sum(batch.num_scored for batch in batches))
        if self.model.training:
            # The mean over the processes, because they average their gradients.
            scored = torch.tensor(normalizer, device=self.accelerator.device)
            normalizer = self.accelerator.reduce(scored, reduction="mean").item()
        return self.even_out([replace(batch, normalizer=normalizer) for batch in batches])

    def compute_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        loss, metrics = LOSSES[self.args.loss_type](model, batch, fused=self.fused, return_accuracy=not model.training)
        for name, value in metrics.items():
            self.metrics.add(name, value, batch.num_scored)
        return loss
