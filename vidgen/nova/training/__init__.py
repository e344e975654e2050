"""The training loss, and the objective of `vidgen train`."""
