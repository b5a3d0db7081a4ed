"""Training and testing on mmengine: runner, optimizers, checkpoint hook."""
