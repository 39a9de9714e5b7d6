"""A folder of audio becomes tar shards."""
