"""Files that survive a crash, and leaving a run without losing a step."""
