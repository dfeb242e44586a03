"""The live system's training on a data-set folder, without a stack: what a demo would learn, in minutes."""
