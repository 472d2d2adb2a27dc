"""Images: finding, reading and resizing them, and putting them into batches."""
