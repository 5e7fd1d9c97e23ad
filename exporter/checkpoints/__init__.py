"""Reading checkpoints: every form they come in, as lazy tensors by canonical name."""
