"""Commands that belong to no model: bench, generate, info, profile, train and verify.

`generate`, `train` and `verify` do what is the same whichever model is named.
"""
