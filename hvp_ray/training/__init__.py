"""Training: the step, the loop, checkpoints, and the launch on Ray."""
