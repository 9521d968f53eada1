"""How completions are sampled, and kept in step with training.

engine       the contract of an engine: prompts and SamplingOptions in, a Rollout per prompt out. check_rollouts
             checks what an engine gave; encode, decode and end_tokens go between text and token ids
generate     TransformersEngine: the trained model itself samples, by transformers `generate`
sampling     the loop that picks each next token there, with reproducible random numbers
vllm         VLLMEngine: requests go to a vLLM server, which gets the trained weights
weights      writes the trained weights as a folder for that server
ahead        samples the next completions while the trainer learns from these (staleness 1)
collector    Collector: from prompts to completions with rewards, for PPOTrainer and GRPOTrainer; owns the engine
prompts      GroupSampler: in which order steps see the prompts; check_readable: whether all models can read them
samples      Samples: completions with their rewards; what is logged and shown of them
experience   ExperienceBuffer: keeps what the optimizer steps learn from, as long as they do
completions  shows completions: a parquet file and a printed table per log
config       OnlineConfig: the options that PPOConfig and GRPOConfig share
"""
