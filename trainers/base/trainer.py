"""What all trainers share: the optimizer step."""

import contextlib
import copy
import dataclasses
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate.utils import gather_object, set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import logging

from ..batch import scoring
from ..batch.batch import Batch, Sequence
from ..batch.packing import fill_by_length
from ..batch.probe import prepare_packing, prepare_sharing, warn_of_batch_dependence
from ..losses.router import find_router_loss
from .checkpoints import processes
from .config import BaseConfig
from .contexts import RandomState, evaluating, isolated_rng
from .hf import HFTrainer
from .kept import State
from .limits import embedded
from .loading import (
    load_model,
    load_tokenizer,
    refuse_prompt_learning,
)
from .metrics import Metrics
from .reference import KeptReference
from .reporting import CurvesCallback
from .rows import LengthGroupedSampler
from .sharding import accumulating, prepare_frozen, refuse_zero3, reshard

logger = logging.get_logger(__name__)

# What the trainers themselves read of a dataset.
COLUMNS = ("prompt", "completion", "messages", "text", "chosen", "rejected", "margin", "sequences", "num_tokens")

# The file of a checkpoint that holds its settings, and the setting that says what the reference is.
SETTINGS, REFERENCE = "settings.json", "reference"

B = TypeVar("B", bound=Batch)


class NonFiniteLoss(RuntimeError):
    """A step's loss was NaN or infinite. The weights are those before it, and were saved."""


class BaseTrainer(HFTrainer):
    """`transformers.Trainer` with an optimizer step of its own, which learns from one batch of the dataloader.

    A subclass turns a batch, a list of rows of the dataset, into micro-batches (`micro_batches`), and a micro-batch
    into its share of the step's loss (`compute_loss`), already divided by what the whole step is normalised with. What
    a step changes before its loss is known stands in `undone`, and is put back if the loss is not finite.

    Args:
        model: a folder, the name of a model in the local Hugging Face cache, or a model in memory.
        args: the config.
        processing_class: the tokenizer; the model's own if None.
        peft_config: of PEFT: adapters are trained, and they alone are saved.
        ref_model: what the model is held against, if it is not what it was at the start; as model.
        needs_reference: whether there is such a model. With peft_config it is the model without its adapters; else a
            copy is kept, adapters included, as where these leave the model's own biases changed.
        **kwargs: of `transformers.Trainer`.
    """

    args: BaseConfig
    auto_class: Any = AutoModelForCausalLM
    columns: tuple[str, ...] = COLUMNS
    #: The `rollouts.collector.Collector` of a trainer that learns from completions of its own prompts; None: its steps
    #: learn from the rows of the dataset themselves.
    collector: Any = None

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: BaseConfig,
        *,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: Any = None,
        ref_model: str | PreTrainedModel | None = None,
        needs_reference: bool = False,
        **kwargs: Any,
    ) -> None:
        refuse_prompt_learning("peft_config", peft_config)
        if isinstance(ref_model, nn.Module) and ref_model is model:
            raise ValueError("ref_model must be another object than model, which changes; None keeps a copy of it")
        if peft_config is not None and hasattr(model, "peft_config"):
            raise ValueError("peft_config must be None where the model has adapters already; got both")
        model = self.load(model, args)
        tokenizer = processing_class or load_tokenizer(model, args)
        # If adapters train biases of the model too, it is not the reference once they are disabled.
        is_kept = peft_config is None or getattr(peft_config, "bias", "none") != "none"
        self.has_own_reference = needs_reference and (ref_model is not None or is_kept)
        self.reference_is = (
            None if not needs_reference else "the model of the start" if ref_model is None else "ref_model"
        )
        reference = None
        if self.has_own_reference:
            refuse_zero3("a reference model")
            reference = copy.deepcopy(model) if ref_model is None else self.load(ref_model, args)
            #: What a checkpoint holds of a reference with adapters: the weights that the model trains.
            self.adapter_names = [name for name, weight in model.named_parameters() if weight.requires_grad]
            reference.eval().requires_grad_(False)
        if peft_config is not None:
            import peft

            model = peft.get_peft_model(model, peft_config)
        models = [model] if reference is None else [model, reference]
        #: Whether log-probabilities come from the LM head without logits.
        self.fused = self.auto_class is AutoModelForCausalLM and all(map(scoring.needs_no_logits, models))
        # Batches are lists of rows of the dataset; there is nothing to collate before they are tokenised.
        super().__init__(model=self.trained(model), args=args, data_collator=list, processing_class=tokenizer, **kwargs)
        args = self.args
        if args.n_gpu > 1:
            raise ValueError(
                "several GPUs in one process are not supported: launch with torchrun or accelerate, or make one visible"
            )
        self.reference_model = None
        if reference is not None:
            self.reference_model = prepare_frozen(self.accelerator, reference)
        for each in models:
            warn_of_batch_dependence(each)
        # The models are on their device now. NEFTune's noise depends on the length of a row, and packed sequences would
        # be one long row.
        packs = args.padding_free and args.neftune_noise_alpha is None
        self.padding_free = packs and all(prepare_packing(each, args.device) for each in models)
        #: What a mixture of experts adds to its loss; None: it has none, or it is not wanted.
        self.router = None
        if hasattr(args, "router_aux_loss_coef"):
            self.router = find_router_loss(model, args.router_aux_loss_coef, args.device)
        for name in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
            if self.router is not None and (getattr(args, name, None) or {}).get("use_reentrant"):
                raise ValueError(
                    f"{name}: use_reentrant must be false with a router loss, which would have no gradient; got true. "
                    "router_aux_loss_coef 0 trains without it"
                )
        #: Whether a prefix that sequences of a micro-batch have in common is run once.
        self.shares_prefixes = self.can_share(models)
        pad = self.processing_class.pad_token_id
        #: One that every model can read, also where the tokenizer has none, or one that was added to it.
        self.pad_token_id = 0 if pad is None or pad >= min(map(embedded, models)) else pad
        #: Which settings differ from those in the checkpoint that this run goes on from, in words.
        self.changed: list[str] = []
        self.keep(SETTINGS, State(self.settings, self._compare_settings), "its settings")
        if self.has_own_reference and ref_model is None:
            self.keep_reference()
        #: What a step changes before its loss is known: owners of state.
        self.undone: list[Any] = [
            State(self._tokens_seen, self._set_tokens_seen),
            self.metrics,
            RandomState(self.accelerator.device),
        ]
        self._before_step: list[Any] = []
        self.add_callback(CurvesCallback())
        # Dropout must differ between the processes; sampling has random numbers of its own.
        set_seed(args.seed, device_specific=True)

    def can_share(self, models: list[Any]) -> bool:
        """Whether these models share prefixes: if `args.share_prefixes` allows it and they can. Raises ValueError if it
        is true and they cannot."""
        wish = getattr(self.args, "share_prefixes", "false")
        if wish == "false":
            return False
        if self.router is not None:
            reason = "the router loss counts a token each time that it is run"
        elif not self.padding_free:
            reason = "batches are padded"
        elif not all(prepare_sharing(each, self.args.device) for each in models):
            reason = "a model cannot share them"
        else:
            return True
        if wish == "true":
            raise ValueError(f"share_prefixes must be auto or false where {reason}; got true")
        if self.router is not None:
            logger.warning(f"prefixes are not shared: {reason}. router_aux_loss_coef 0 shares them")
        return False

    def load(self, model: str | PreTrainedModel, args: BaseConfig) -> PreTrainedModel:
        if isinstance(model, str):
            return load_model(model, args, self.auto_class)
        refuse_prompt_learning("peft_config of the model", model)
        return model

    def train(self, *args: Any, **kwargs: Any) -> Any:
        with contextlib.nullcontext() if self.collector is None else self.collector.running():
            return super().train(*args, **kwargs)

    def trained(self, model: nn.Module) -> nn.Module:
        """The module that the optimizer gets: the model, and what else a subclass trains with it."""
        return model

    @contextlib.contextmanager
    def reference(self) -> Iterator[nn.Module]:
        """The model whose log-probabilities are the reference, in evaluation mode, without gradients."""
        if self.reference_model is not None:
            with torch.no_grad():
                yield self.reference_model
            return
        model: Any = self.accelerator.unwrap_model(self.model_wrapped)
        with self.frozen(model), model.disable_adapter():
            yield self.model_wrapped

    @contextlib.contextmanager
    def frozen(self, model: nn.Module) -> Iterator[None]:
        """Inside, forward passes of the model have neither gradients nor dropout."""
        with torch.no_grad(), evaluating(model):
            yield

    def token_logprobs(self, model: nn.Module, batch: Batch, **options: Any) -> Any:
        """`scoring.token_logprobs`, without logits if no model of this trainer needs them."""
        return scoring.token_logprobs(model, batch, fused=self.fused, **options)

    def chunks(self, sequences: list[Sequence], rows: Iterable[int] | None = None) -> list[list[int]]:
        """These rows, or all, in micro-batches of at most `token_budget` tokens; rows of similar length together."""
        return fill_by_length(sequences, self.args.token_budget, rows)

    def even_chunks(self, sequences: list[Sequence], rows: Iterable[int] | None = None) -> list[list[int]]:
        """`chunks`, as many on every process, since a sharded model must run equally often on each. A process with
        fewer runs its first again."""
        chunks = self.chunks(sequences, rows)
        return chunks + (chunks[:1] or [[0]]) * (self.most_on_any_process(len(chunks)) - len(chunks))

    def lay_out(self, sequences: list[Sequence], kind: type[B], **fields: Any) -> B:
        """A batch of this kind, with these further fields, on the device of training."""
        return kind.lay_out(
            sequences, self.accelerator.device, padding_free=self.padding_free, pad_token_id=self.pad_token_id, **fields
        )

    # Data

    def train_sampler(self) -> Sampler | None:
        if self.collector is not None:
            return self.collector.prompt_sampler
        if self.args.train_sampling_strategy != "group_by_length":
            return super().train_sampler()
        size = self.train_batch_size * self.accelerator.num_processes
        # state.epoch is a whole number where an epoch begins.
        return LengthGroupedSampler(
            self.train_dataset["num_tokens"][:], size, self.args.data_seed, lambda: int(self.state.epoch or 0)
        )

    def eval_sampler(self, eval_dataset: Any) -> Sampler | None:
        if self.collector is not None:
            return self.collector.eval_sampler(eval_dataset)
        is_grouped = self.args.train_sampling_strategy == "group_by_length"
        return None if is_grouped else super().eval_sampler(eval_dataset)

    # The optimizer step

    def micro_batches(self, inputs: list[dict[str, Any]]) -> list[Batch]:
        """The micro-batches of one optimizer step, at least one, and as many on every process (`even_out`). Each has
        the step's `normalizer`."""
        raise NotImplementedError

    def compute_loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The micro-batch's share of the step's loss."""
        raise NotImplementedError

    def parts(self, rows: Any) -> list:
        """The rows of one optimizer step, or of one batch of evaluation, in the parts whose router losses are
        taken: TRL's micro-batches. All in one if there is none."""
        size = self.args.per_device_train_batch_size
        if self.router is None or not self.model.training:
            return [rows]
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def joined(self, parts: list[list[B]]) -> list[B]:
        """The micro-batches of all parts, with their `router_share`. All parts have the same share, as in TRL; a part
        that token_budget split shares it among its micro-batches by their number of tokens."""
        joined = []
        for part in parts:
            tokens = sum(len(batch.token_ids) for batch in part)
            for batch in part:
                share = len(batch.token_ids) / tokens / len(parts)
                joined.append(dataclasses.replace(batch, router_share=share))
        return joined

    def even_out(self, batches: list[B]) -> list[B]:
        """Repeats the first micro-batch as a filler, where another process has more: every process must take part in
        each forward and backward pass."""
        missing = self.most_on_any_process(len(batches)) - len(batches)
        return [dataclasses.replace(batches[0], is_filler=True)] * missing + batches

    def most_on_any_process(self, count: int) -> int:
        if self.accelerator.num_processes == 1:
            return count
        return int(self.accelerator.gather(torch.tensor([count], device=self.accelerator.device)).max())

    def training_step(
        self, model: nn.Module, inputs: list[dict[str, Any]], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        model.train()
        if callable(getattr(self.optimizer, "train", None)):  # schedule-free optimizers
            self.optimizer.train()
        self._before_step = [owner.state_dict() for owner in self.undone]
        batches = self.micro_batches(inputs)
        self._record_tokens(batches)
        total = torch.zeros((), device=self.accelerator.device)
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            with contextlib.nullcontext() if last else accumulating(self.accelerator, model):
                loss = self._counted_loss(model, batch)
                total += loss.detach()
                if last:  # before DeepSpeed steps, in its last backward pass
                    self._agree(total, inputs)
                self.accelerator.backward(loss)
        return total

    def _record_tokens(self, batches: list[Batch]) -> None:
        """Logs means over steps and processes."""
        counted = [batch for batch in batches if not batch.is_filler]
        self.metrics.add("tokens", sum(batch.num_tokens for batch in counted))
        self.metrics.add("tokens_run", sum(batch.num_run for batch in counted))

    def _agree(self, total: Tensor, inputs: list[dict[str, Any]]) -> None:
        """Stops all processes if the loss of one is not finite, or notes that one of them was asked to stop."""
        asked = torch.full_like(total, self.stop.number)
        found = self.accelerator.gather(torch.stack([total, asked])).view(-1, 2).tolist()
        if not all(math.isfinite(loss) for loss, _ in found):
            self.undo_step()
            self._stop(total.item(), inputs)
        self.stop.agreed = int(max(number for _, number in found))

    def undo_step(self) -> None:
        """Restores the state before the step that was begun."""
        for owner, state in zip(self.undone, self._before_step, strict=True):
            owner.load_state_dict(state)

    def _counted_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        if not batch.is_filler:
            return self._whole_loss(model, batch)
        with self.metrics_into(Metrics(self.accelerator.device)):
            return self._whole_loss(model, batch) * 0.0

    def _whole_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        if self.router is None:
            return self.compute_loss(model, batch)
        with self.router.watching() as seen:
            loss = self.compute_loss(model, batch)
        # The last pass is the policy's. The reference, the same model without its adapters, may have run before it.
        router_loss, share = seen[-1].to(loss.device), batch.router_share
        self.metrics.add("aux_loss", router_loss.detach(), share)
        return loss + self.router.coef * share * router_loss

    def _stop(self, loss: float, inputs: list[dict[str, Any]]) -> None:
        # With SFT's packing several rows fill the place of one, and `_row_id` is a list.
        rows = {index for row in inputs for index in np.atleast_1d(row.get("_row_id", ())).tolist()}
        found = gather_object([(loss, rows)]) if self.accelerator.num_processes > 1 else [(loss, rows)]
        if self.saved_step != self.state.global_step:
            reshard(self.model)
            self.save_checkpoint()
        loss = next(value for value, _ in found if not math.isfinite(value))
        named = ", ".join(map(str, sorted(set().union(*(rows for _, rows in found)))))
        raise NonFiniteLoss(
            f"step {self.state.global_step + 1}: the loss is {loss}, on rows {named} of train_dataset; the state "
            f"before this step is in {self.checkpoint_folder()}"
        )

    @contextlib.contextmanager
    def metrics_into(self, metrics: Metrics) -> Iterator[None]:
        own, self.metrics = self.metrics, metrics
        try:
            yield
        finally:
            self.metrics = own

    # Evaluation and logs

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        with self.metrics_into(Metrics(self.accelerator.device)):
            count = self.evaluate_rows(dataloader)
            found = self.metrics.flush(self.accelerator)
        values = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=values, num_samples=count)

    def evaluate_rows(self, dataloader: DataLoader) -> int:
        """Records the loss of an evaluation set and what else `compute_loss` records; returns the number of rows.
        A collector samples completions of the prompts instead, and records their rewards."""
        if self.collector is not None:
            return self.collector.evaluate(dataloader)
        with self.frozen(self.model):
            for inputs in dataloader:
                own = self._own_rows(inputs)
                with self.accelerator.autocast():
                    batches = self.micro_batches(own or inputs[:1])
                    batches = [batch if own else dataclasses.replace(batch, is_filler=True) for batch in batches]
                    total = sum((self._counted_loss(self.model, batch).detach() for batch in batches), torch.zeros(()))
                self.metrics.add("loss", total, batches[-1].normalizer if own else 0.0)
                self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        return len(dataloader.dataset)  # type: ignore[arg-type]

    def _own_rows(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The rows without those that only fill up the last batch of each process."""
        state = self.accelerator.gradient_state
        if not state.end_of_dataloader or state.remainder <= 0:
            return inputs
        return inputs[: max(state.remainder - self.accelerator.process_index * len(inputs), 0)]

    def add_tokens_seen(self, seen: int) -> None:
        """Adds the tokens that this process has seen; every process calls it."""
        self.state.num_input_tokens_seen += int(self.accelerator.reduce(torch.tensor(seen, device=self.args.device)))

    def _tokens_seen(self) -> int:
        return self.state.num_input_tokens_seen

    def _set_tokens_seen(self, seen: int) -> None:
        self.state.num_input_tokens_seen = seen

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in transformers, with random numbers of its own: the same each time, and apart from those of training."""
        with isolated_rng(self.args.seed, self.accelerator.device), self.stop.while_doing("evaluating"):
            found = super().evaluate(*args, **kwargs)
        reshard(self.model)
        return found

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # the Trainer's estimate needs tokenised inputs

    # The rows that a step learns from depend on its number and on these settings alone.

    def settings(self) -> dict[str, Any]:
        """By name: the settings of the order of rows, and with a collector those that experience depends on."""
        return {**self.row_settings(), **({} if self.collector is None else self.collector.settings())}

    def row_settings(self) -> dict[str, Any]:
        """By name, what the order of rows depends on, and where the reference is from."""
        names = ("per_device_train_batch_size", "data_seed", "dataloader_drop_last", "train_sampling_strategy")
        return {
            **{name: getattr(self.args, name, None) for name in names},
            "gradient_accumulation_steps": self.accumulation_steps,
            "processes": self.args.world_size,
            "rows of train_dataset": len(self.train_dataset),
            REFERENCE: self.reference_is,
        }

    def _compare_settings(self, before: dict[str, Any] | None) -> None:
        """Sets `self.changed`, and warns if the run goes on at another place in its data, or with another reference."""
        if before is None:  # of an earlier version
            self.changed = [f"settings, which {self.resumed_from} does not hold"]
            return
        now = json.loads(json.dumps(self.settings(), default=str))
        before["processes"] = processes(Path(str(self.resumed_from)))  # as many as wrote files
        names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        told = {name: f"{name} (was {before.get(name)}, is {now.get(name)})" for name in names}
        self.changed = [*told.values()]
        if REFERENCE in told:
            logger.warning(f"{self.resumed_from} is of a run with another {told.pop(REFERENCE)}")
        if moves := [why for name, why in told.items() if name in self.row_settings()]:
            logger.warning(
                f"{self.resumed_from} is of a run with another {', '.join(moves)}: its steps count, and this run goes "
                f"on in the data where {self.state.global_step} steps of its own would have ended"
            )

    def keep_reference(self) -> None:
        """Puts the reference into checkpoints."""
        self.kept.append(
            KeptReference(
                self.accelerator,
                self.reference_model,
                self.auto_class,
                self.adapter_names,
                self.args.trust_remote_code,
            )
        )
