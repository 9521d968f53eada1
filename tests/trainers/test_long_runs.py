"""Memory over 500 steps: what the first hundred have left allocated is all that there is."""

import gc
import tracemalloc
from pathlib import Path

import pytest
from transformers import TrainerCallback

from rlkernels.trainers import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

# The model has 36,000 weights. A gradient kept in each step, or a batch's logits, would be 50 MB; a Python list of a
# batch's token ids, 300 kB.
MOST_RSS, MOST_PYTHON = 8e6, 150e3
STEPS, FROM = 500, 100


def resident() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


class Memory(TrainerCallback):
    """What Python has allocated and what the process holds, every hundred steps."""

    def __init__(self) -> None:
        self.python: list[int] = []
        self.resident: list[int] = []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % 100 == 0:
            gc.collect()
            self.python.append(tracemalloc.get_traced_memory()[0])
            self.resident.append(resident())


@pytest.fixture
def train(run_options):
    def run(build, config_class, **options) -> Memory:
        memory = Memory()
        # A line of the log is kept for each log, as transformers does; with ten lines they are nothing.
        options = run_options | {"max_steps": STEPS, "logging_steps": 50, "per_device_train_batch_size": 4} | options
        trainer = build(config_class(**options))
        trainer.add_callback(memory)
        tracemalloc.start()
        try:
            trainer.train()
        finally:
            tracemalloc.stop()
        assert trainer.state.global_step == STEPS
        return memory

    return run


@pytest.mark.thorough
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_of_grpo_is_flat(train, make_model, tokenizer):
    """With evaluations, checkpoints and completions written on the way."""

    def reward(completion_ids, log_metric, log_extra, **kwargs):
        log_metric("length", len(completion_ids[0]))
        log_extra("first", [ids[0] for ids in completion_ids])
        return [float(ids[0] % 5) for ids in completion_ids]

    def build(args):
        rows = [{"prompt": "ab" + "c" * i} for i in range(8)]
        return GRPOTrainer(make_model(), reward, args, rows, rows[:2], tokenizer)

    memory = train(
        build,
        GRPOConfig,
        num_generations=4,
        max_completion_length=4,
        num_completions_to_print=0,
        eval_strategy="steps",
        eval_steps=50,
        save_strategy="steps",
        save_steps=50,
        save_total_limit=1,
    )
    check(memory)


@pytest.mark.thorough
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_of_fine_tuning_is_flat(train, make_model, tokenizer):
    rows = [{"prompt": "ab" * (i % 4) + ":", "completion": "cdefgh"[: i % 6]} for i in range(24)]
    check(train(lambda args: SFTTrainer(make_model(), args, rows, None, tokenizer), SFTConfig))


def check(memory: Memory) -> None:
    python, held = memory.python, memory.resident
    assert len(python) == STEPS // 100
    assert python[-1] - python[0] < MOST_PYTHON, [f"{each:,}" for each in python]
    assert held[-1] - held[0] < MOST_RSS, [f"{each:,}" for each in held]
