"""Shards on other machines, over https and s3."""
