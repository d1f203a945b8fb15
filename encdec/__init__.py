"""encdec: pretrain, distil, evaluate and ship encoder-decoder small language models in JAX."""

__version__ = "0.2.0"
