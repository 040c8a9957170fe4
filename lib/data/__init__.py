"""Text as windows of tokens: corpora by name or path, the papers' sampling, evaluation windows.

May import `config`, `demo`, `errors` and `files`.
"""
