"""What is measured: see `__main__`."""
