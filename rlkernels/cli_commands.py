"""What the training commands are, and the arguments that each takes besides its config.

`cli` lists them for --help, and `cli_train` runs them. This module needs neither transformers nor the trainers, so that
`rlkernels info` and `rlkernels bench` start without them.
"""

from dataclasses import dataclass, field


@dataclass(kw_only=True)
class RunArguments:
    """Arguments of every training command. Every field of the trainer's config is an option too."""

    model: str = field(metadata={"help": "Folder of the model, or its name in the local Hugging Face cache."})
    dataset: str = field(
        metadata={
            "help": "A .jsonl, .json, .csv or .parquet file, a folder of such files named after their splits "
            "(train.jsonl, test.jsonl), or a dataset on the Hugging Face hub."
        }
    )
    config: str | None = field(
        default=None, metadata={"help": "YAML file of options. Options on the command line override it."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a dataset on the hub."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = field(
        default="test", metadata={"help": "Split to evaluate on, if eval_strategy asks for evaluation."}
    )
    use_peft: bool = field(default=False, metadata={"help": "Train and save a LoRA adapter, not the model itself."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=32, metadata={"help": "The adapter's output is scaled by lora_alpha / lora_r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout on the adapter's input."})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Names of the layers that get an adapter, or all-linear. PEFT chooses if unset."},
    )


@dataclass(kw_only=True)
class DPOArguments(RunArguments):
    ref_model: str | None = field(
        default=None, metadata={"help": "The reference model. The model at the start if unset."}
    )


@dataclass(kw_only=True)
class GRPOArguments(RunArguments):
    reward: list[str] = field(metadata={"help": "Reward functions, each as module:function."})


@dataclass(kw_only=True)
class PPOArguments(DPOArguments):
    reward: list[str] | None = field(default=None, metadata={"help": "Reward functions, each as module:function."})
    reward_model: str | None = field(
        default=None,
        metadata={"help": "A model trained by `rlkernels reward`. Its score is one more reward."},
    )
    value_model: str | None = field(
        default=None, metadata={"help": "A classifier with one label that initialises the value model."}
    )


@dataclass(frozen=True)
class Command:
    """A training command. It runs {method}Trainer of rlkernels.trainers with a {method}Config."""

    method: str
    help: str
    rows: str  # the columns that a row of the dataset has
    arguments: type[RunArguments] = RunArguments
    online: bool = False  # whether it samples completions and rewards them
    task_type: str = "CAUSAL_LM"


COMMANDS = {
    "sft": Command("SFT", "imitate texts", "prompt and completion, messages, or text"),
    "reward": Command(
        "Reward",
        "train a reward model on pairs of texts, one of them preferred",
        "chosen and rejected, with or without prompt and margin",
        task_type="SEQ_CLS",
    ),
    "dpo": Command(
        "DPO", "learn from pairs of completions, one of them preferred", "prompt, chosen and rejected", DPOArguments
    ),
    "ppo": Command(
        "PPO",
        "learn from rewards of sampled completions, with a value model",
        "prompt, and what the reward functions take",
        PPOArguments,
        online=True,
    ),
    "grpo": Command(
        "GRPO",
        "learn from rewards of groups of sampled completions",
        "prompt, and what the reward functions take",
        GRPOArguments,
        online=True,
    ),
}
