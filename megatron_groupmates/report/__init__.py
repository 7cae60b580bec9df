"""Reports on finished and running runs: figures, plots, one HTML page."""
