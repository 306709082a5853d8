"""The training loop, optimizers and schedules, checkpoints and signals."""
