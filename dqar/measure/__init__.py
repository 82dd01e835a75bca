"""How images, costs and results are taken: sampling, recorders, metrics, tables with their provenance."""
