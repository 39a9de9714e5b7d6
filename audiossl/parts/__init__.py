"""What methods are built of, beside the encoder."""
