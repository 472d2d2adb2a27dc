"""Networks in plain torch, and how a name, a file or a folder becomes one with its weights."""
