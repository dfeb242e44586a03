"""`mimstream index`: the Faust app and the path of an item from a record to a row."""
