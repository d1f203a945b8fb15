"""Text to records, and records to batches.

What training needs begins at ``records`` and ``batches`` and knows no task. TensorFlow is imported
by ``tasks`` (ours as seqio's), ``gin_bindings``, ``prepare_command`` and ``tfds_source`` alone.
"""
