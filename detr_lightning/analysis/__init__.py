"""Analysis of a store: objects, matching with annotations, search, statistics, pictures."""
