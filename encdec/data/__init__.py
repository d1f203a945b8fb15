"""Text to records (TensorFlow side) and records to batches (TensorFlow-free side).

TensorFlow-free: ``vocabulary``, ``records``, ``features``, ``batches``, ``packing``,
``objectives``, ``readers``, ``blocks``, ``corpora``. With TensorFlow: ``tasks``, ``prepare``.
"""
