"""Networks in plain torch, and loading one with its weights from a name, a file or a folder."""
