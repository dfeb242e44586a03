"""Content to vectors: towers, fusion, bundles. Knows torch; opens no socket."""
