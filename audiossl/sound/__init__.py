"""From a file to a waveform to a log-mel spectrogram, and back."""
