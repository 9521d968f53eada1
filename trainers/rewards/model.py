"""A reward model as a reward function. PPOTrainer and GRPOTrainer wrap each model among their `reward_funcs` in one."""

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..base.chat import apply_chat_template, is_chat
from ..base.limits import Limits
from ..base.loading import load_tokenizer, model_folder
from ..batch import scoring
from ..batch.batch import IGNORE, Batch, Sequence, sharing
from ..batch.packing import fill_by_length
from ..batch.probe import prepare_packing, prepare_sharing
from ..rollouts.config import OnlineConfig
from ..rollouts.engine import encode


class RewardModel:
    """A reward function that scores prompt and completion with a sequence classifier of one label.

    If the classifier has no tokenizer, or one with the policy's vocabulary, it reads the policy's tokens, including the
    end token. Otherwise it reads the text, encoded by its own tokenizer.
    """

    def __init__(self, model: Any, args: OnlineConfig) -> None:
        self.model, self.args = model, args
        self.path = model.config._name_or_path
        self.__name__ = self.path.rstrip("/").split("/")[-1] or type(model).__name__

    def prepare(self, accelerator: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        """Moves the model to the accelerator's device. Call it once before the first call; `tokenizer` is the
        policy's."""
        self.accelerator, self.tokenizer = accelerator, tokenizer
        own = _tokenizer(self.model, self.args)
        self.own_tokenizer = None if own is None or own.get_vocab() == tokenizer.get_vocab() else own
        self.limits = Limits.of(self.model)
        #: Whether the model can read every token sequence that its tokenizer can give.
        self.fits = self.limits.fit(self.own_tokenizer or tokenizer)
        self.model.to(accelerator.device).eval()
        self.padding_free = self.args.padding_free and prepare_packing(self.model, accelerator.device)
        #: Whether what the completions of a prompt begin with is run once for all of them.
        self.shares_prefixes = self.args.share_prefixes != "false" and self._can_share(accelerator.device)

    def _can_share(self, device: torch.device) -> bool:
        if self.padding_free and prepare_sharing(self.model, device):
            return True
        if self.args.share_prefixes == "true":
            reason = f"the reward model {self.__name__} cannot share them"
            raise ValueError(f"share_prefixes must be auto or false where {reason}; got true")
        return False

    def check_prompt(self, prompt: Any) -> None:
        """Raises ValueError if the prompt alone is beyond the model's limits."""
        for ids in self._token_ids([prompt], [[] if is_chat(prompt) else ""], [[-1]]):
            self._check(ids)

    def _check(self, ids: list[int]) -> None:
        try:
            self.limits.check(ids)
        except ValueError as error:
            raise ValueError(f"for the reward model {self.__name__} it {error}") from None

    @torch.no_grad()
    def __call__(self, prompts: list, completions: list, completion_ids: list[list[int]], **columns: Any) -> list:
        rows = self._token_ids(prompts, completions, completion_ids)
        for ids in rows:
            self._check(ids)
        sequences = self._sequences(prompts, rows)
        scores = [0.0] * len(rows)
        for chunk in fill_by_length(sequences, self.args.token_budget):
            laid_out = [sequences[row] for row in chunk]
            batch = Batch.lay_out(laid_out, self.accelerator.device, padding_free=self.padding_free)
            with self.accelerator.autocast():
                last = batch.last(scoring.token_scores(self.model, batch))
            for row, score in zip(chunk, last.tolist(), strict=True):
                scores[row] = score
        return scores

    def _sequences(self, prompts: list, rows: list[list[int]]) -> list[Sequence]:
        """The token ids as sequences. Those of one prompt share what all of them begin with."""
        sequences = [Sequence(ids, [IGNORE] * len(ids)) for ids in rows]
        if self.shares_prefixes:
            of_prompt: dict[str, list[int]] = {}
            for row, prompt in enumerate(prompts):
                of_prompt.setdefault(repr(prompt), []).append(row)
            for same in of_prompt.values():
                for row, sequence in zip(same, sharing([sequences[row] for row in same]), strict=True):
                    sequences[row] = sequence
        return sequences

    def _token_ids(self, prompts: list, completions: list, completion_ids: list[list[int]]) -> list[list[int]]:
        if self.own_tokenizer is None:
            prompt_ids = encode(self.tokenizer, prompts, self.args.chat_template_kwargs)
            return [prompt + completion for prompt, completion in zip(prompt_ids, completion_ids, strict=True)]
        pairs = list(zip(prompts, completions, strict=True))
        if is_chat(prompts[0]):
            messages = [prompt + completion for prompt, completion in pairs]
            return apply_chat_template(self.own_tokenizer, messages, tokenize=True, return_dict=True)["input_ids"]
        rows = self.own_tokenizer([prompt + completion for prompt, completion in pairs])["input_ids"]
        end = self.own_tokenizer.eos_token_id
        ended = [ids[-1] == self.tokenizer.eos_token_id and end is not None for ids in completion_ids]
        return [[*row, end] if add and row[-1] != end else row for row, add in zip(rows, ended, strict=True)]


def _tokenizer(model: Any, args: OnlineConfig) -> PreTrainedTokenizerBase | None:
    """The model's own tokenizer, or None if its folder has none. It raises if there is one that cannot be loaded, since
    the policy's token ids would then have another meaning."""
    try:
        folder = model_folder(model.config._name_or_path or ".")
    except FileNotFoundError:
        return None
    has_one = any(any(folder.glob(pattern)) for pattern in ("tokenizer*", "vocab*", "*.model"))
    return load_tokenizer(model, args, "reward_funcs") if has_one else None
