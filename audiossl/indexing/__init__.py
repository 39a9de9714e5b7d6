"""Where each clip lies in which shard, and whether it is still there."""
