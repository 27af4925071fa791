"""Orders in which the images of a large source are drawn, and the groups that are never parted."""
