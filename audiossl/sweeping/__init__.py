"""The points of a sweep: which there are, which are done, who runs them and what came out."""
