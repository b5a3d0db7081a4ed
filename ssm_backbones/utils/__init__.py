"""Shared helpers: errors, atomic files, signals, the location of the configs, compatibility with PyTorch versions."""
