"""How errors are told to people."""


def one_line(error: BaseException) -> str:
    """Its class and the first line of what it says, if anything."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
