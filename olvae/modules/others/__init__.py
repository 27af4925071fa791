"""Networks of other projects as encoders and decoders of ours: diffusers' whole classes, and TAESD's architecture."""
