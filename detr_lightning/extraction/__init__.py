"""Writing an extraction: the run, its journals, the callback."""
