"""Trained drafts that come with the package, and prompts to train others by."""
