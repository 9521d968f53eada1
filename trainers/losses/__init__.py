"""From rewards to advantages, and from advantages to the loss."""
