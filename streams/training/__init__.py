"""`mimstream train`: the loop around `trainer.online.trainer`."""
