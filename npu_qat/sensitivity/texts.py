"""What a scan reads: token sequences with a prompt, whose completion is scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Text:
    """Token ids: the model reads all of them, and the loss is that of ``completion``.

    Raises ``ValueError`` if either part is empty.
    """

    prompt: tuple[int, ...]
    completion: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.prompt or not self.completion:
            raise ValueError("a text needs a prompt and a completion of at least one token each")

    @property
    def tokens(self) -> list[int]:
        return [*self.prompt, *self.completion]


def check_texts(texts: Sequence[Text]) -> None:
    """Raises ``ValueError`` if there is nothing to scan with."""
    if not texts:
        raise ValueError("a scan needs at least one text")
