"""What a run of any method needs around its training step."""
