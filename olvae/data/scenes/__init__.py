"""Read satellite and aerial images of any size by windows, as tiles: scenes."""
