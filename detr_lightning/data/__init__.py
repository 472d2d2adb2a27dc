"""Images: finding, reading, resizing and batching them."""
