"""Words that came from a file, made fit to be read."""

LONG = 3000  # characters of a message


def readable(text: str, most: int = LONG) -> str:
    """The text with control characters, what turns the direction of writing and lone surrogates written as escapes, and
    the middle of a long one left out: names in a hostile file cannot redraw a terminal or fill a log."""
    if len(text) > most:
        text = f"{text[: most * 2 // 3]} ... {text[-most // 3 :]}"
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() or each == "\n" else ascii(each)[1:-1] for each in text)
