"""Text to show while tokens are generated: whole characters, and no part of a stop string."""

from collections.abc import Sequence

from gpt.data.tokenizers import StreamDecoder, Tokenizer


class TextStream:
    """Decodes tokens to whole characters, and holds back what is, or may become, a stop string.

    ended: whether a stop string has appeared. The first to be complete counts.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self._decoder, self._stops = StreamDecoder(tokenizer), stops
        self._held, self.ended = "", False

    def push(self, token: int) -> str:
        """Add a token; returns the text that may now be shown."""
        return self._show(self._decoder.push(token))

    def flush(self) -> str:
        """Return the text held back at the end."""
        return self._show(self._decoder.flush()) + ("" if self.ended else self._held)

    def _show(self, text: str) -> str:
        if self.ended:
            return ""
        self._held += text
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.ended = True
            return self._held[: min(found)[1]]
        longest = max(map(len, self._stops), default=1) - 1
        starts = range(max(0, len(self._held) - longest), len(self._held))
        keep = next((i for i in starts if any(s.startswith(self._held[i:]) for s in self._stops)), len(self._held))
        shown, self._held = self._held[:keep], self._held[keep:]
        return shown
