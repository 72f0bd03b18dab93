"""What a scan reads: token sequences with a prompt, whose completion is scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


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


def check_texts(texts: Sequence[Text], model: Any) -> None:
    """Raises ``ValueError`` if there is nothing to scan ``model`` with, or more than it can read.

    Positions that a model was never trained for have errors that no user of it will meet.
    """
    if not texts:
        raise ValueError("a scan needs at least one text")
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    for number, text in enumerate(texts, start=1):
        if limit is not None and len(text.tokens) > limit:
            raise ValueError(
                f"text {number} has {len(text.tokens):,} tokens and this model's context is "
                f"{limit:,} (max_position_embeddings): shorten it"
            )
