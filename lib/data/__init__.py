"""Text as windows of tokens: corpora by name or path, the papers' sampling, evaluation windows.

Imports `config`, `demo` and `errors`.
"""
