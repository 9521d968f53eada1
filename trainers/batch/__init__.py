"""One micro-batch: how sequences fill it, are laid out, kept apart by attention, and scored by the model."""
