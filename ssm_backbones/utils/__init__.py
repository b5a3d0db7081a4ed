"""What every room may use: errors, atomic files, signals, the configs' place, newer and older PyTorch."""
