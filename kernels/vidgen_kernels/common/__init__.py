"""What the families of operators share; it knows no operator."""
