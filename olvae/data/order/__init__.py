"""Orders in which the images of a large source are drawn."""
