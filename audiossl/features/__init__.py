"""What is read off an encoder's features."""
