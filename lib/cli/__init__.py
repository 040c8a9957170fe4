"""The command lines: flags, argument types, checks before any model is loaded, exit statuses.

May import `config`, `storage`, `runtime` (its launcher), `version` and `errors`; never torch.
"""
