"""The composition root: one module per process that names every concrete class."""
