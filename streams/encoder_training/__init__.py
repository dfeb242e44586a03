"""`pretrain` and `csft` from topics and folders: the I/O around `trainer.csft.trainer`."""
