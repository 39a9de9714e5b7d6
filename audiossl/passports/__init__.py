"""What a data passport counts, measures, compares and shows."""
