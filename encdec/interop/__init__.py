"""Other projects' models, converted to our parameter layout."""
