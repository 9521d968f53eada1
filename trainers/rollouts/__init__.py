"""How completions are sampled: engines, what they give, and who keeps them in step with training."""
