"""Neural click models: CiUBM and its published peers, on the same columns, features and training loop."""
