"""The config of a run: composed from the command line and checked before torch is imported."""
