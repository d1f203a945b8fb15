"""Models from elsewhere, in our layout."""
