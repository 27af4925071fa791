"""Images of any size within a stated memory: padding, exact tiles for the decoder, strips of rows for the encoder."""
