"""Text of a reply, token by token."""

from collections.abc import Callable

Decode = Callable[[list[int]], str]  # token ids → text


class Detokenizer:
    """Incremental detokenizer of one reply. A character that is split between tokens comes with its last token.

    Args:
        decode: Token ids → text.
        im_end: The token that ends a reply's text; it has no text.
    """

    def __init__(self, decode: Decode, im_end: int):
        self._decode, self._im_end = decode, im_end
        self._ids: list[int] = []
        self._given = ""

    def add(self, token: int) -> str:
        """Returns the text that this token adds; ``im_end`` flushes an incomplete character."""
        if token != self._im_end:
            self._ids.append(token)
        text = self._decode(self._ids)
        text = text if token == self._im_end else text.rstrip("\ufffd")
        if not text.startswith(self._given):
            return ""
        added, self._given = text[len(self._given) :], text
        return added
