"""Pruning of large language models: see `docs/` and the README for use, CONTRIBUTING.md for the layout."""
