"""Direct preference optimization (arXiv 2305.18290) and its relatives: learning from pairs of completions."""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import datasets
import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.utils import logging

import rlkernels

from .base.checkpoints import BadCheckpoint
from .base.config import BaseConfig, router_field, share_prefixes_field
from .base.kept import State
from .base.limits import Limits
from .base.loading import disable_dropout, load_tokenizer, refuse_prompt_learning
from .base.reference_cache import cache_file, hash_model, read, write
from .base.rows import each_part
from .base.sharding import refuse_zero3, reshard
from .base.trainer import BaseTrainer
from .batch import scoring
from .batch.batch import IGNORE, Batch, Sequence, num_run, shift
from .batch.packing import fill
from .batch.probe import prepare_packing
from .data import check_rows, preference_pair, prepare, sequences_of

# The losses that label_smoothing changes.
SMOOTHED = {"sigmoid", "exo_pair", "robust", "aot", "aot_unpaired", "simpo"}
# The losses that are no sums over pairs: they sort the pairs of a micro-batch, or divide by the number of its tokens.
OVER_THE_BATCH = {"aot", "aot_unpaired", "sft", "orpo"}


@dataclass(repr=False)
class DPOConfig(BaseConfig):
    """Options of `DPOTrainer`. An optimizer step is `gradient_accumulation_steps` x `per_device_train_batch_size` pairs
    on each device."""

    dataset_num_proc: int | None = field(
        default=None, metadata={"help": "Number of processes that tokenize the dataset; this process alone if unset."}
    )
    max_length: int | None = field(
        default=1024,
        metadata={
            "help": "Most tokens of a prompt with a completion. Longer sequences are truncated at the end; pairs whose "
            "prompt leaves no room for a completion are left out."
        },
    )
    disable_dropout: bool = field(default=True, metadata={"help": "Train without dropout."})
    precompute_ref_log_probs: bool = field(
        default=False,
        metadata={
            "help": "Compute the reference's log-probabilities of all pairs before training, so that the reference "
            "does not stay in memory. The cache of `datasets` keeps them on disk for other runs on the same pairs."
        },
    )

    router_aux_loss_coef: float | None = router_field()
    share_prefixes: str = share_prefixes_field()
    loss_type: list[str] = field(
        default_factory=lambda: ["sigmoid"],
        metadata={
            "help": "One or several losses of `rlkernels.preference_loss`, which are added. sft, simpo and orpo need "
            "no reference.",
            "choices": [
                *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot"),
                *("aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm", "simpo", "orpo"),
            ],
        },
    )
    loss_weights: list[float] | None = field(
        default=None, metadata={"help": "One weight per loss, such as 0.8 0.2 1.0 for MPO; all 1 if unset."}
    )
    beta: float = field(
        default=0.1, metadata={"help": "A higher beta keeps the model closer to the reference (tau of IPO)."}
    )
    label_smoothing: float = field(
        default=0.0,
        metadata={
            "help": "Assumed share of pairs in which chosen and rejected are swapped, in sigmoid (cDPO; TRL's sigmoid "
            "ignores it), exo_pair, robust, aot, aot_unpaired and simpo."
        },
    )
    f_divergence_type: str = field(
        default="reverse_kl",
        metadata={
            "help": "The divergence from the reference. Those other than reverse_kl work with sigmoid, sigmoid_norm, "
            "hinge, ipo, exo_pair, robust, discopop and sft.",
            "choices": ["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"],
        },
    )
    f_alpha_divergence_coef: float = field(
        default=0.5, metadata={"help": "Alpha of alpha_divergence. At 1 it is reverse_kl."}
    )
    discopop_tau: float = field(default=0.05, metadata={"help": "Temperature tau of discopop."})
    simpo_gamma: float = field(default=0.5, metadata={"help": "The margin by which simpo wants chosen above rejected."})
    ld_alpha: float | None = field(
        default=None,
        metadata={
            "help": "LD-DPO: the weight, from 0 to 1, of a completion's tokens beyond the length of the pair's other "
            "completion; 1 if unset."
        },
    )
    use_weighting: bool = field(
        default=False,
        metadata={"help": "WPO: weight each pair by the probability of its completions under the current model."},
    )
    sync_ref_model: bool = field(
        default=False,
        metadata={
            "help": "TR-DPO: every ref_model_sync_steps steps, replace the reference by (1 - ref_model_mixup_alpha) x "
            "reference + ref_model_mixup_alpha x model."
        },
    )
    ref_model_mixup_alpha: float = field(
        default=0.6, metadata={"help": "The model's share when sync_ref_model updates the reference."}
    )
    ref_model_sync_steps: int = field(
        default=512,
        metadata={"help": "Optimizer steps between updates of the reference by sync_ref_model."},
    )

    def __post_init__(self) -> None:
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        super().__post_init__()
        if not self.loss_type:
            raise ValueError("loss_type must name at least one loss; got none")
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss_type):
            raise ValueError(
                f"loss_weights must have one entry per loss, {len(self.loss_type)}; got {len(self.loss_weights)}"
            )
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"max_length must be at least 2; got {self.max_length}")
        if self.ld_alpha is not None and not 0 <= self.ld_alpha <= 1:
            raise ValueError(f"ld_alpha must be from 0 to 1; got {self.ld_alpha}")
        if self.label_smoothing and SMOOTHED.isdisjoint(self.loss_type):
            raise ValueError(
                f"label_smoothing must be 0 with loss_type {', '.join(self.loss_type)}; got {self.label_smoothing}"
            )
        if self.use_weighting and not OVER_THE_BATCH.isdisjoint(self.loss_type):
            raise ValueError(
                f"use_weighting must be off with {', '.join(sorted(OVER_THE_BATCH))}, which are not sums over pairs; "
                f"got loss_type {', '.join(self.loss_type)}"
            )
        if not 0 < self.ref_model_mixup_alpha <= 1:
            raise ValueError(f"ref_model_mixup_alpha must be above 0 and at most 1; got {self.ref_model_mixup_alpha}")
        if self.sync_ref_model and self.precompute_ref_log_probs:
            raise ValueError("sync_ref_model and precompute_ref_log_probs exclude each other: the reference changes")
        nothing: Any = torch.zeros(0)
        for loss in self.loss_type:
            try:
                rlkernels.preference_loss(
                    *[nothing] * 4, chosen_lengths=nothing, rejected_lengths=nothing, **self.loss_options(loss)
                )
            except ValueError as error:
                raise ValueError(
                    f"loss_type {loss} with f_divergence_type {self.f_divergence_type}: {error}"
                ) from error

    def loss_options(self, loss: str) -> dict[str, Any]:
        """Keyword arguments of `rlkernels.preference_loss` for one of the losses."""
        return {
            "loss": loss,
            "beta": self.beta,
            "label_smoothing": self.label_smoothing if loss in SMOOTHED else 0.0,
            "divergence": self.f_divergence_type,
            "alpha": self.f_alpha_divergence_coef,
            "discopop_tau": self.discopop_tau,
            "simpo_gamma": self.simpo_gamma,
        }


WITHOUT_REFERENCE = {"sft", "simpo", "orpo"}
METRICS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)
REFERENCE_LOGPS = ("ref_chosen_logps", "ref_rejected_logps")


@dataclass(frozen=True, kw_only=True, eq=False)
class DPOBatch(Batch):
    """The chosen completions of P pairs, then the rejected ones: S = 2 P sequences.

    lengths     int64 [S]: the tokens of each completion
    weights     float32 [N]: the weight of each token's log-probability in its completion's (ld_alpha); None: 1
    reference   float32 [S]: the reference's log-probability of each completion; None where it is not precomputed
    """

    lengths: Tensor
    weights: Tensor | None = None
    reference: Tensor | None = None

    def completion_logprobs(self, logprobs: Tensor) -> Tensor:
        """[S]: the log-probability of each completion, from those of its tokens, [N]."""
        return self.sequence_sums(logprobs if self.weights is None else logprobs * self.weights)


class DPOTrainer(BaseTrainer):
    """Trains a causal language model on pairs of a preferred and a rejected completion.

    The loss is `rlkernels.preference_loss`, or a weighted sum of several (MPO), of the log-probabilities of both
    completions under the model and under a reference: the model as it was, unless another is given. Chosen and rejected
    completions of a micro-batch run as one packed batch, in which a prompt runs once (`share_prefixes`), through the LM
    head without logits.

    The loss of an optimizer step is the mean over its pairs, in micro-batches filled by `token_budget`. The losses aot,
    aot_unpaired, sft and orpo look at all pairs of a micro-batch: with any of them micro-batches are TRL's, of
    `per_device_train_batch_size` pairs (`per_device_eval_batch_size` in evaluation), whatever their tokens.

    Args:
        model: a folder, the name of a model in the local Hugging Face cache, or a model in memory.
        args: the config; `DPOConfig()` if None.
        train_dataset: rows with `chosen` and `rejected`, text or messages, and a `prompt` unless both start with it.
        eval_dataset: the same, or a dict of several.
        processing_class: the tokenizer; the model's own if None.
        ref_model: the reference, as model; a copy of the model if None.
        peft_config: a config of PEFT: adapters are trained, and the reference is the model without them.
        callbacks, optimizers: as in `transformers.Trainer`.
    """

    args: DPOConfig

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: DPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        ref_model: str | PreTrainedModel | None = None,
        peft_config: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
    ) -> None:
        args = DPOConfig() if args is None else args
        refuse_prompt_learning("peft_config", peft_config)
        #: Whether there is a reference.
        self.has_reference = ref_model is not None or not WITHOUT_REFERENCE.issuperset(args.loss_type)
        if args.sync_ref_model and (peft_config is not None or not self.has_reference):
            reason = "a reference, which these losses do not use" if peft_config is None else "a reference of its own"
            raise ValueError(f"sync_ref_model needs {reason}")
        if self.has_reference:
            refuse_zero3("a reference model")
        precompute = self.has_reference and args.precompute_ref_log_probs
        # The Trainer makes the output folder, so all that can be refused is looked at before.
        model = self.load(model, args)
        if ref_model is not None and not precompute:
            ref_model = self.load(ref_model, args)
        read_by = [each for each in (model, ref_model) if isinstance(each, nn.Module)]
        tokenizer = processing_class or load_tokenizer(model, args)
        self.prepared = partial(
            prepare,
            tokenize=partial(preference_pair, tokenizer, max_length=args.max_length),
            tokenizer=tokenizer,
            columns=("chosen", "rejected"),
            limits=Limits.of(*read_by),
            num_proc=args.dataset_num_proc,
        )
        train_dataset = self.prepared("train_dataset", train_dataset)
        eval_dataset = each_part(eval_dataset, self.prepared)
        #: The hash of the reference, if its log-probabilities are precomputed; None: the reference runs in each step.
        self.reference_hash: str | None = None
        if precompute:
            # The layout is none of these: it changes rounding alone.
            settings = (args.bf16, args.fp16, args.ld_alpha, args.model_init_kwargs)
            self.reference_hash = hash_model(model if ref_model is None else ref_model, settings)
        super().__init__(
            model,
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            ref_model=ref_model,
            peft_config=peft_config,
            needs_reference=self.has_reference and not precompute,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if args.use_weighting and not self.fused:
            raise ValueError("use_weighting needs models whose LM head gives log-probabilities without logits")
        for each in (self.model, self.reference_model):
            if args.disable_dropout and each is not None:
                disable_dropout(each)
        if args.sync_ref_model:
            if ref_model is not None:
                self.keep_reference()
            self.add_callback(SyncReference(self.accelerator.unwrap_model(self.reference_model)))
        self.columns = ("sequences", "num_tokens", *REFERENCE_LOGPS)
        self.keep(
            "reference_hash",
            State(lambda: self.reference_hash, self._check_reference),
            "the hash of its reference",
        )
        self.loss_weights = args.loss_weights or [1.0] * len(args.loss_type)
        self.ref_model, self.has_adapter = ref_model, peft_config is not None
        self.train_dataset = self.with_reference("train_dataset", train_dataset)
        self.eval_dataset = each_part(eval_dataset, self.with_reference)

    # Data

    def with_reference(self, name: str, rows: datasets.Dataset) -> datasets.Dataset:
        """The rows with the reference's log-probabilities, if these are precomputed. They are read from the cache, or
        computed and written to it."""
        if self.reference_hash is None or REFERENCE_LOGPS[0] in rows.column_names:
            return rows
        file = cache_file(rows, self.reference_hash)
        # One process reads and writes, because the others may be on other machines.
        found = [read(file) if self.accelerator.is_main_process else None]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(found)
        values = found[0]
        if values is None:
            values = self._run_reference(name, rows)
            if self.accelerator.is_main_process:
                write(file, values)
        for column, part in zip(REFERENCE_LOGPS, values, strict=True):
            rows = rows.add_column(column, part)
        return rows

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self.with_reference("eval_dataset", self.prepared("eval_dataset", eval_dataset))
        return super().get_eval_dataloader(eval_dataset)

    def micro_batches(self, inputs: list[dict[str, Any]]) -> list[Batch]:
        if self.model.training:
            self.add_tokens_seen(sum(row["num_tokens"] for row in inputs))
        parts: list[list[DPOBatch]] = []
        for rows in self.parts(inputs):
            pairs = [self._pair(row) for row in rows]
            if OVER_THE_BATCH.isdisjoint(self.args.loss_type):
                chunks = fill(map(num_run, pairs), self.args.token_budget)
            else:
                size = self.args.per_device_train_batch_size if self.model.training else len(rows)
                chunks = fill([1] * len(rows), size)
            parts.append([])
            for chunk in chunks:
                parts[-1].append(self._lay_out([rows[index] for index in chunk], [pairs[index] for index in chunk]))
        return self.even_out([replace(batch, normalizer=len(inputs)) for batch in self.joined(parts)])

    def _pair(self, row: dict[str, Any]) -> list[Sequence]:
        return sequences_of(row, self.shares_prefixes)

    def _lay_out(self, rows: list[dict[str, Any]], pairs: list[list[Sequence]]) -> DPOBatch:
        device, alpha = self.accelerator.device, self.args.ld_alpha
        sequences = [sequence for side in zip(*pairs, strict=True) for sequence in side]
        counts = [sum(label != IGNORE for label in sequence.labels[1:]) for sequence in sequences]
        weights = reference = None
        if alpha is not None:
            shared = list(map(min, counts[: len(pairs)], counts[len(pairs) :])) * 2
            beyond = [count - least for count, least in zip(counts, shared, strict=True)]
            each = zip(sequences, beyond, strict=True)
            weights = shift([[1.0] * (one.branch_length - tail) + [alpha] * tail for one, tail in each], device)
        if REFERENCE_LOGPS[0] in rows[0]:
            known = [row[column] for column in REFERENCE_LOGPS for row in rows]
            reference = torch.tensor(known, dtype=torch.float32, device=device)
        lengths = torch.tensor(counts, device=device)
        return self.lay_out(sequences, DPOBatch, lengths=lengths, weights=weights, reference=reference)

    # The loss

    def compute_loss(self, model: nn.Module, batch: DPOBatch) -> Tensor:
        """The mean over the micro-batch's pairs, times their share in the step's pairs."""
        lengths, pairs = batch.lengths, len(batch.lengths) // 2
        reference = batch.reference
        if reference is None and self.has_reference:
            # Before the model's own pass, whose activations stay in memory until the backward pass.
            with self.reference() as frozen:
                reference = batch.completion_logprobs(scoring.token_logprobs(frozen, batch, fused=self.fused))
        wanted: dict[str, Any] = {"outputs": ("log_sum_sq_probs",)} if self.args.use_weighting else {}
        logprobs, entropy, *others = scoring.token_logprobs(
            model, batch, fused=self.fused, return_entropy=True, **wanted
        )
        logps = batch.completion_logprobs(logprobs)
        vectors = {
            "policy_chosen": logps[:pairs],
            "policy_rejected": logps[pairs:],
            "ref_chosen": None if reference is None else reference[:pairs],
            "ref_rejected": None if reference is None else reference[pairs:],
            "chosen_lengths": lengths[:pairs],
            "rejected_lengths": lengths[pairs:],
        }
        weights = None
        if self.args.use_weighting:
            likelihoods = batch.sequence_sums(logprobs.detach() - others[0]) / lengths
            weights = (likelihoods[:pairs] + likelihoods[pairs:]).exp()
        terms = [self._term(loss, vectors, weights) for loss in self.args.loss_type]
        total: Any = sum(weight * loss for weight, (loss, _) in zip(self.loss_weights, terms, strict=True))
        for name, value in zip(METRICS, terms[0][1].unbind(), strict=True):
            self.metrics.add(name, value, pairs)
        self.metrics.add("entropy", entropy.detach().sum() / max(batch.num_scored, 1), batch.num_scored)
        return total * (pairs / batch.normalizer)

    def _term(self, loss: str, vectors: dict[str, Any], weights: Tensor | None) -> tuple[Tensor, Tensor]:
        """One of the losses, with its pairs weighted, and its metrics."""
        options = self.args.loss_options(loss)
        value, metrics = rlkernels.preference_loss(**vectors, **options)
        if weights is not None:
            alone = [
                {name: None if each is None else each[pair : pair + 1] for name, each in vectors.items()}
                for pair in range(len(weights))
            ]
            value = (
                torch.stack([rlkernels.preference_loss(**pair, **options)[0] for pair in alone]) @ weights / len(alone)
            )
        return value, metrics

    def _run_reference(self, name: str, rows: datasets.Dataset) -> np.ndarray:
        """The reference's log-probabilities [2, rows]: of the chosen completions, then of the rejected ones. Each
        process computes its share."""
        if self.ref_model is not None:
            reference = self.load(self.ref_model, self.args).requires_grad_(False)
            check_rows(name, rows, Limits.of(reference))
            self.fused = self.fused and scoring.needs_no_logits(reference)
            self.padding_free = self.padding_free and prepare_packing(reference, self.args.device)
            self.shares_prefixes = self.shares_prefixes and self.can_share([reference])
            self.reference_model = reference.to(self.accelerator.device).eval()
        elif not self.has_adapter:
            if self.state.global_step > 0:
                raise ValueError(
                    f"{name}: with precompute_ref_log_probs the reference, the model as it was, is gone once training "
                    "has begun: give this dataset to the trainer as eval_dataset"
                )
            self.reference_model = self.model.eval()
        order = sorted(range(len(rows)), key=rows["num_tokens"][:].__getitem__)
        order = order[self.accelerator.process_index :: self.accelerator.num_processes]
        # Rows are read twice, so that they need not all be in memory.
        chunks = fill((num_run(self._pair(rows[index])) for index in order), self.args.token_budget)
        parts = []
        with self.reference() as reference, self.accelerator.autocast():
            for chunk in logging.tqdm(chunks, desc=f"Reference of {name}", disable=self.args.disable_tqdm):
                indices = [order[index] for index in chunk]
                read = [rows[index] for index in indices]
                batch = self._lay_out(read, list(map(self._pair, read)))
                logps = batch.completion_logprobs(scoring.token_logprobs(reference, batch, fused=self.fused))
                parts.append((indices, logps.view(2, -1).cpu().numpy()))
        self.reference_model = None
        values = np.empty((2, len(rows)), np.float32)
        for indices, part in gather_object(parts) if self.accelerator.num_processes > 1 else parts:
            values[:, indices] = part
        return values

    # A resumed run needs the same reference, even if it is given the checkpoint as its model.

    def _check_reference(self, precomputed: str | None) -> None:
        if precomputed is not None and self.reference_hash not in (None, precomputed):
            raise BadCheckpoint(
                str(self.resumed_from),
                "its run precomputed the log-probabilities of another reference; give the model, and ref_model if "
                "there was one, that it started with",
            )


class SyncReference(TrainerCallback):
    """Moves the reference towards the model every ref_model_sync_steps steps (TR-DPO, arXiv 2404.09656)."""

    def __init__(self, reference: nn.Module) -> None:
        self.reference = reference

    @torch.no_grad()
    def on_step_end(self, args: DPOConfig, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        if state.global_step % args.ref_model_sync_steps == 0:
            reshard(self.reference)
            for behind, ahead in zip(self.reference.parameters(), model.parameters(), strict=True):
                behind.lerp_(ahead, args.ref_model_mixup_alpha)
