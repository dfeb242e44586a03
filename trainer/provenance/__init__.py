"""What a release was trained on: the journal and the exact rebuild."""
