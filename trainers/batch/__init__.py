"""One micro-batch: how sequences are laid out, kept apart by attention, and scored by the model."""
