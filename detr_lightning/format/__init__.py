"""The format on disk: schema, files, the state of an unfinished run."""
