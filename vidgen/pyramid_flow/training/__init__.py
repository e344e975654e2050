"""The loss, and its connection to `vidgen train`."""
