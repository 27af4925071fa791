"""Networks of other projects as our encoders and decoders: diffusers' classes, and TAESD's."""
