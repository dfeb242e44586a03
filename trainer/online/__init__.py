"""`OnlineTrainer` and what stands around it: intake, variants, shadow trial, gate."""
