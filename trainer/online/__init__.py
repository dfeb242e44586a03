"""`OnlineTrainer` and what stands around it: intake, variants, shadow evaluation, gate."""
