"""Writing an extraction: the run, its journals, and the callbacks."""
