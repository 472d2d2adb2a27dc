"""The on-disk format: schema, files and the state of an unfinished run."""
