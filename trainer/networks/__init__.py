"""torch modules, losses, collate, one optimiser step, the scorer."""
