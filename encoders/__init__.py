"""Content to vectors: towers, fusion, bundles. Imports torch; opens no socket."""
