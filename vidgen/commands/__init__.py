"""`vidgen generate`, `train` and `verify`: what they do whichever model is named."""
