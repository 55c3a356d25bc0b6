"""Makes Retrv-R1 models: one module per stage, one recipe for all of them."""
