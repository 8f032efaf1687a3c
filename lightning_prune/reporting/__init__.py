"""What is told about a run: tables, scalars, histograms."""
