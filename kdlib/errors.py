"""The error of invalid input that the user can fix."""

LONGEST = 500  # letters of a message


class UserError(Exception):
    """Invalid input that the user can fix. The message is one line: what was wrong, where, and what would be right.

    The command line prints it and exits with code 2. A notebook shows it in the failing cell. A message may quote
    what a file holds, so line breaks, control characters and other unprintable characters become escapes, and the
    middle of a long message becomes three dots.
    """

    def __init__(self, message: str):
        if len(message) > LONGEST:
            message = _ends(message)
        line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
        super().__init__(line if len(line) <= LONGEST else _ends(line))


def _ends(text: str) -> str:
    return f"{text[:300]} ... {text[-(LONGEST - 305) :]}"
