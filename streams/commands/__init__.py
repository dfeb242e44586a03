"""One module per command of `mimstream`: arguments, then a call into the wiring."""
