"""Text to records, and records to batches.

What training needs begins at ``records`` and ``batches`` and knows no task. TensorFlow is imported
by ``seqio_registration`` (our tasks as seqio's) and ``tfds_source`` alone.
"""
