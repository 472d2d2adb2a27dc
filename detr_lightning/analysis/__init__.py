"""On top of a store: objects, matching with annotations, pictures."""
