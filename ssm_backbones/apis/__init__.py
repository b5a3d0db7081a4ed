"""Models, configs, images and checks: from a config and a checkpoint to a model, for every tool."""
