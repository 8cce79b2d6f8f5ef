"""The one exception that means: the user can fix this."""


class UserError(Exception):
    """One clear line: cause and cure."""
