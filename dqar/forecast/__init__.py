"""The second engine: the whole model's output, computed at some steps and forecast at the others."""
