"""A small HTTP server with continuous batching over the cached one-token step."""
