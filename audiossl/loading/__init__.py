"""Which clip comes when, how it is read and cut, and what became of it."""
