"""Decoder-only models turned into encoder-decoders that start from their parameters."""
