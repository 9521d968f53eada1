"""Config fields: TRL's names and defaults, a help sentence each, usable from the command line."""

import copy
import dataclasses
import importlib
import math
import os
import typing
from pathlib import Path

import pytest
import torch
from transformers import HfArgumentParser, TrainingArguments

from rlkernels import trainers
from rlkernels.trainers import DPOConfig, GRPOConfig, PPOConfig, RewardConfig, SFTConfig
from rlkernels.trainers.base import config as base_config
from rlkernels.trainers.base import field_values
from rlkernels.trainers.rollouts.config import OnlineConfig

CONFIGS = [GRPOConfig, RewardConfig, SFTConfig]

NOT_TRL = {
    *("token_budget", "padding_free", "share_prefixes", "advantage", "dynamic_sampling_max_rounds"),
    *("overlong_buffer_length", "overlong_penalty"),
    *("importance_sampling_correction", "importance_sampling_mode", "importance_sampling_cap", "staleness"),
    *("vllm_request_timeout", "vllm_max_concurrency", "vllm_weights_folder"),
    *("reward_timeout", "reward_workers", "on_reward_error"),
}
"""Fields that TRL's config has not."""


@pytest.mark.parametrize("config", CONFIGS)
def test_names_and_defaults_are_those_of_trl(config, tmp_path):
    trl = pytest.importorskip("trl")
    options = {"output_dir": str(tmp_path), "use_cpu": True}
    theirs, ours = getattr(trl, config.__name__)(**options), config(**options)
    # The run name and the log folder carry a time; bf16 follows the device, where TRL asks for it everywhere;
    # columns are kept by all trainers, where in TRL only those with reward functions keep them; completions are kept
    # and some shown without being asked; TRL's has activation_checkpointing by its older name where transformers has.
    others = ("bf16", "run_name", "logging_dir", "remove_unused_columns", "log_completions", "num_completions_to_print")
    others += ("activation_checkpointing",)
    for field in dataclasses.fields(config):
        if field.name not in (*others, *NOT_TRL):
            assert getattr(ours, field.name) == getattr(theirs, field.name), field.name


@pytest.mark.parametrize("config", CONFIGS)
def test_every_field_has_its_own_help(config):
    inherited = dataclasses.fields(TrainingArguments)
    own = [field for field in dataclasses.fields(config) if field not in inherited or field.name in vars(config)]
    helps = [field.metadata["help"] for field in own]
    assert len(helps) >= 9
    assert all(len(text) > 20 and text.endswith(".") for text in helps)
    assert len(set(helps)) == len(helps)
    assert helps[0][:20] in HfArgumentParser(config).format_help()


def test_command_line():
    parser = HfArgumentParser(GRPOConfig)
    options = "--output_dir x --loss_type grpo --beta 0.1 --reward_weights 1 0.5 --shuffle_dataset false --bf16 false"
    json = ["--chat_template_kwargs", '{"enable_thinking": false}', "--model_init_kwargs", '{"dtype": "bfloat16"}']
    (config,) = parser.parse_args_into_dataclasses([*options.split(), *json])
    assert (config.loss_type, config.beta, config.reward_weights) == ("grpo", 0.1, [1.0, 0.5])
    assert (config.shuffle_dataset, config.bf16) == (False, False)
    assert config.chat_template_kwargs == {"enable_thinking": False}
    assert config.model_init_kwargs == {"dtype": "bfloat16"}
    assert "Clipped" not in parser.format_help() and "clipped from below" in parser.format_help()


def test_bf16_follows_the_device(tmp_path, monkeypatch):
    monkeypatch.setattr(base_config, "_computes_bf16", lambda use_cpu: False)
    assert GRPOConfig(output_dir=str(tmp_path), use_cpu=True).bf16 is False
    monkeypatch.setattr(base_config, "_computes_bf16", lambda use_cpu: True)
    assert GRPOConfig(output_dir=str(tmp_path), use_cpu=True).bf16 is True
    assert GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False).bf16 is False


@pytest.mark.skipif(torch.accelerator.is_available(), reason="tells of machines without an accelerator")
@pytest.mark.parametrize(
    "capabilities, expected", [({"amx_bf16": True}, True), ({"avx512_bf16": True}, True), ({"avx2": True}, False)]
)
def test_bf16_on_a_cpu_needs_instructions(capabilities, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert base_config._computes_bf16(use_cpu=True) is expected


@pytest.mark.parametrize("name", ["activation_checkpointing", "gradient_checkpointing"])
def test_activation_checkpointing_has_two_names(name, tmp_path):
    """Trainers of transformers below 5.23 read the second."""
    for options, expected in (({}, True), ({name: True}, True), ({name: False}, False)):
        config = SFTConfig(output_dir=str(tmp_path), use_cpu=True, **options)
        assert (config.activation_checkpointing, config.gradient_checkpointing) == (expected, expected)


def test_generation_batch(tmp_path):
    def make(**options):
        config = GRPOConfig(output_dir=str(tmp_path), per_device_train_batch_size=8, use_cpu=True, **options)
        return config.steps_per_generation, config.generation_batch_size

    assert make() == (1, 8)
    assert make(gradient_accumulation_steps=2) == (2, 16)
    assert make(steps_per_generation=4) == (4, 32)
    assert make(generation_batch_size=24) == (3, 24)


def test_read_back(tmp_path):
    """A config rebuilt from its own values: `steps_per_generation` and `generation_batch_size` are then both set."""
    config = GRPOConfig(output_dir=str(tmp_path), steps_per_generation=4, use_cpu=True)
    assert dataclasses.replace(config).generation_batch_size == config.generation_batch_size


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_generations": 3}, "must be divisible by num_generations"),
        ({"num_generations": 1}, "num_generations must be at least 2"),
        ({"loss_type": "ppo"}, "loss_type must be one of grpo, bnpo, dr_grpo, dapo, luspo, .*; got 'ppo'"),
        ({"loss_type": "cispo"}, "epsilon_high must be at least 1 with loss_type cispo, .*; got None"),
        ({"advantage": "gae"}, "advantage must be one of grpo, rloo, reinforce_plus_plus; got 'gae'"),
        ({"importance_sampling_level": "word"}, "importance_sampling_level must be one of token, sequence; got 'word'"),
        (
            {"importance_sampling_level": "sequence", "loss_type": "sapo"},
            "importance_sampling_level 'sequence' goes with loss_type grpo, bnpo, dr_grpo, dapo, luspo; got 'sapo'",
        ),
        (
            {"multi_objective_aggregation": "normalize_then_sum", "advantage": "rloo"},
            "multi_objective_aggregation 'normalize_then_sum' goes with advantage 'grpo'; got 'rloo'",
        ),
        ({"importance_sampling_mode": "mask"}, "importance_sampling_mode must be one of token_truncate, "),
        ({"importance_sampling_cap": 0.0}, "importance_sampling_cap must be a finite number above 0; got 0.0"),
        ({"delta": -1.0}, "delta must be a finite number above 0; got -1.0"),
        ({"sapo_temperature_neg": 0.0}, "sapo_temperature_neg must be a finite number above 0; got 0.0"),
        ({"vespo_k_pos": float("inf")}, "vespo_k_pos must be a finite number above 0; got inf"),
        ({"top_entropy_quantile": 1.5}, "top_entropy_quantile must be between 0 and 1; got 1.5"),
        ({"overlong_buffer_length": 0}, r"overlong_buffer_length must be between 1 and .* \(512\); got 0"),
        ({"overlong_buffer_length": 513}, r"overlong_buffer_length must be between 1 and .* \(512\); got 513"),
        ({"overlong_penalty": -1.0}, "overlong_penalty must be a finite number, at least 0; got -1.0"),
        ({"dynamic_sampling_max_rounds": -1}, "dynamic_sampling_max_rounds must be at least 0; got -1"),
        (
            {"dynamic_sampling_max_rounds": 1, "advantage": "reinforce_plus_plus", "num_generations": 1},
            "dynamic_sampling_max_rounds needs groups",
        ),
        ({"scale_rewards": "all"}, "scale_rewards must be one of"),
        ({"multi_objective_aggregation": "max"}, "multi_objective_aggregation must be one of"),
        ({"temperature": 0.0}, "temperature must be a finite number above 0"),
        ({"beta": -0.1}, "beta must be a finite number, at least 0; got -0.1"),
        ({"num_iterations": 0}, "num_iterations must be at least 1"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be at least 1; got 0"),
        ({"dataloader_num_workers": -1}, "dataloader_num_workers must be at least 0; got -1"),
        ({"adam_beta1": 2.0}, "adam_beta1 must be at least 0 and below 1; got 2.0"),
        ({"weight_decay": float("nan")}, "weight_decay must be a finite number, at least 0; got nan"),
        ({"max_steps": 0}, "max_steps must be at least 1, or -1; got 0"),
        ({"data_seed": 2**32}, r"data_seed must be from 0 to 2\^32 - 1; got 4294967296"),
        ({"save_strategy": "steps", "save_steps": 0}, "save_steps must be above 0 with save_strategy steps; got 0"),
        ({"eval_strategy": "steps", "eval_steps": -1}, "eval_steps must be above 0 with eval_strategy steps; got -1"),
        ({"logging_steps": -1}, "logging_steps must be above 0 with logging_strategy steps; got -1"),
        ({"reward_weights": [1.0, 10**400]}, "reward_weights must be a number that fits in 64 bits; got one of 1329"),
        ({"output_dir": ""}, "output_dir must name a folder; got ''"),
        ({"log_level": "loud"}, "log_level must be one of .*; got 'loud'"),
        ({"generation_batch_size": 12}, "must be a multiple of per_device_train_batch_size x processes"),
        ({"generation_batch_size": 16, "steps_per_generation": 3}, "exclude each other"),
        ({"steps_per_generation": 3, "gradient_accumulation_steps": 2}, "multiple of gradient_accumulation_steps"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size is not supported"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is not supported; got 0.1"),
        ({"torch_empty_cache_steps": 4}, "torch_empty_cache_steps is not supported; got 4"),
        ({"bf16_full_eval": True}, "bf16_full_eval is not supported; got True"),
        ({"use_liger_kernel": True}, "use_liger_kernel is not supported; got True"),
        ({"average_tokens_across_devices": False}, "average_tokens_across_devices is not supported; got False"),
        ({"eval_accumulation_steps": 2}, "eval_accumulation_steps is not supported; got 2"),
        ({"include_for_metrics": ["loss"]}, r"include_for_metrics is not supported; got \['loss'\]"),
        ({"debug": "underflow_overflow"}, "debug is not supported; got underflow_overflow"),
        ({"accelerator_config": {"dispatch_batches": True}}, "accelerator_config: dispatch_batches is not supported"),
        ({"accelerator_config": {"use_seedable_sampler": False}}, "use_seedable_sampler is not supported; got False"),
        ({"train_sampling_strategy": "batch_rebalance"}, "batch_rebalance is not supported: token_budget"),
        ({"train_sampling_strategy": "sequential"}, "must be random; got sequential. To keep the prompts in"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha is not supported: the noise"),
        ({"num_completions_to_print": -1}, "num_completions_to_print must be at least 0; got -1"),
        ({"reward_timeout": 0.0}, "reward_timeout must be a number of seconds above 0, or None; got 0.0"),
        ({"reward_timeout": float("nan")}, "reward_timeout must be a number of seconds above 0, or None; got nan"),
        ({"reward_workers": -1}, "reward_workers must be at least 0; got -1"),
        ({"on_reward_error": "skip"}, "on_reward_error must be one of raise, none; got 'skip'"),
    ],
)
def test_bad_values(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        GRPOConfig(**{"output_dir": str(tmp_path), "use_cpu": True, **options})


@pytest.mark.parametrize("name", ["SFTConfig", "RewardConfig", "DPOConfig", "PPOConfig", "GRPOConfig"])
def test_no_field_holds_what_it_must_not(name):
    """The trainers' fields and those of transformers: numbers are finite and of 64 bits, text is no number."""
    config = getattr(trainers, name)
    options, types, tried = {"use_cpu": True, "report_to": "none"}, typing.get_type_hints(config), 0
    for field in dataclasses.fields(config):
        if not field.init or field.name in field_values.OF_ANY_TYPE:
            continue
        kinds = {*typing.get_args(types[field.name]), types[field.name]}
        bad = [object(), [object()]]
        if {int, float, list[float]} & kinds:
            bad += [math.nan, -math.inf, 10**400, -(10**5000), 1e-46, 1e39, "3", True]
        elif bool in kinds:
            bad += [3, math.nan] + ["False"] * (str not in kinds)
        elif str in kinds:
            bad += ["x\0y", 3]
        for value in bad:
            if types[field.name] == str | bool and value is True:
                continue
            tried += 1
            with pytest.raises((TypeError, ValueError), match=rf"^{field.name} must "):
                config(**{**options, field.name: value})
    assert tried > 500


@pytest.mark.parametrize(
    "options", [{"max_grad_norm": math.inf}, {"save_total_limit": 0}, {"save_total_limit": -1}, {"max_grad_norm": 0}]
)
def test_what_transformers_takes_for_no_limit_is_taken(options):
    config = SFTConfig(use_cpu=True, report_to="none", **options)
    assert {name: getattr(config, name) for name in options} == options


def test_every_process_of_fsdp_reads_the_weights(monkeypatch):
    """Else all but the first would copy a reference model that has none."""
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    SFTConfig(use_cpu=True, report_to="none")
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "False"


def test_deepspeed_is_for_the_launcher():
    with pytest.raises(ValueError, match="set up deepspeed by accelerate launch only: see examples/accelerate"):
        SFTConfig(deepspeed={"zero_optimization": {"stage": 2}}, use_cpu=True, report_to="none")


@pytest.mark.parametrize("config", [DPOConfig, GRPOConfig, PPOConfig, RewardConfig, SFTConfig])
def test_secrets_are_neither_shown_nor_stored(config, tmp_path):
    """In what is saved with a model, told to loggers or printed; a copy in the process has them."""
    address = {"vllm_server_base_url": "https://me:hf_one%40@host:1/v1"} if issubclass(config, OnlineConfig) else {}
    given = {"hub_token": "hf_one", "model_init_kwargs": {"token": "hf_one", "dtype": "float32"}}
    args = config(output_dir=str(tmp_path), use_cpu=True, **given, **address)
    torch.save(args, tmp_path / "training_args.bin")
    for text in (repr(args), str(args), str(args.to_dict()), args.to_json_string(), str(args.to_sanitized_dict())):
        assert "hf_one" not in text
    assert b"hf_one" not in (tmp_path / "training_args.bin").read_bytes()
    loaded = torch.load(tmp_path / "training_args.bin", weights_only=False)
    assert (loaded.hub_token, loaded.model_init_kwargs) == (None, {"token": None, "dtype": "float32"})
    if address:
        assert loaded.vllm_server_base_url == "https://host:1/v1" and "https://host:1/v1" in repr(args)
    for same in (copy.copy(args), copy.deepcopy(args), dataclasses.replace(args)):
        assert same.hub_token == "hf_one" and same.model_init_kwargs["token"] == "hf_one"
        assert all(getattr(same, name) == value for name, value in address.items())


def test_a_password_is_not_in_what_is_said_of_its_address(tmp_path):
    with pytest.raises(ValueError, match=r"must begin with http:// or https://.*; got 'ftp://host:1'$"):
        GRPOConfig(output_dir=str(tmp_path), use_cpu=True, vllm_server_base_url="ftp://me:hf/one@host:1")


@pytest.mark.parametrize("trainer", ["SFT", "PPO"])
def test_a_saved_model_holds_no_secrets(trainer, run_options, monkeypatch):
    """Nor does a checkpoint, in any file."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    worker = importlib.import_module("survival_worker")
    rows, options = worker.METHODS[trainer]
    monkeypatch.setitem(worker.METHODS, trainer, (rows, options | {"hub_token": "hf_one", "max_steps": 1}))
    run = worker.build(trainer, run_options["output_dir"])
    run.train()
    run.save_model()
    files = [path for path in Path(run_options["output_dir"]).rglob("*") if path.is_file()]
    assert {"training_args.bin", "trainer_state.json", "optimizer.pt"} <= {path.name for path in files}
    assert run.args.hub_token == "hf_one" and not [path for path in files if b"hf_one" in path.read_bytes()]
