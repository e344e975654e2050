"""Code that all families of operators share. It imports none of them."""
