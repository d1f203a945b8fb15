"""Every metric of generated text, defined once, each with its convention; intervals; tests."""
