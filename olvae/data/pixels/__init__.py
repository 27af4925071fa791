"""Read arrays of pixels from files; state the size of images and the range of their values."""
