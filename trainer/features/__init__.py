"""Features of the moment: what items, users and pairs of them are known by when a row is scored or learned from."""
