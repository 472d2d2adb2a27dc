"""Which images there are, how they are read and resized, and which of them share a batch."""
