"""The one exception a user meets: a line that names the file, key or value, and the way out."""


class UserError(Exception):
    """Report wrong input in one line; the commands print it without a traceback and exit with 2."""
