"""What all five trainers share.

trainer          BaseTrainer: the optimizer step, from the rows of a batch to the update
hf               HFTrainer: hooks in place of private methods of transformers.Trainer; hf_private: the table of these
config           BaseConfig: the options of every trainer; field_values checks their types and ranges
loading          models and tokenizers from folders; limits: the tokens and positions that a model can read
chat             chat templates, with a time limit
rows             checks of datasets, and samplers: the order in which steps see rows
metrics          means and extremes for the logs; reporting: curves.png and other files for people
checkpoints      complete or absent, on disk; kept: the files of what has state; reference: the reference model there
resuming         from which checkpoint a run goes on; states: whether it fits the run
lock             one run in a folder at a time; save_callback: when a run saves and stops
sharding         FSDP2 and DeepSpeed
interrupts       Ctrl-C and SIGTERM
contexts         restoring random states and a model's mode
reference_cache  log-probabilities of DPO's reference on disk
"""
