"""The command lines: flags, argument types, checks made before any model is loaded, exit statuses.

Imports `config`, `storage` and `errors`; never torch.
"""
