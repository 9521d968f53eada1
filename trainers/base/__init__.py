"""What all trainers stand on: the step, its config, its logs, its checkpoints, and what is loaded before it."""
