"""What is measured: models, and the updates and rollouts of each, by the number of devices.

Shapes are small, so that one model is built and measured in seconds, and they differ in what the
formulas depend on: width and depth, how the base is stored, the ZeRO stage, rows and tokens of a
micro-batch, checkpointing. Time may run out, so that the important cases stand first.
"""

from __future__ import annotations

from dataclasses import dataclass, field

# Of the adapters of all cases.
RANK, TARGETS = 32, "all-linear"


@dataclass(frozen=True)
class Update:
    """A micro-batch: sequences and tokens of each. ``ragged``: one row is a token shorter, as real
    batches are, which makes attention take a mask."""

    sequences: int
    tokens: int
    checkpointing: bool = False
    ragged: bool = True


@dataclass(frozen=True)
class Decode:
    """A batch of prompts."""

    sequences: int
    prompt: int = 256


@dataclass(frozen=True)
class Job:
    """A model that is built once, and what is measured on it."""

    model: str
    storage: str
    zero: int = 0
    bucket: int | None = None
    updates: tuple[Update, ...] = ()
    decodes: tuple[Decode, ...] = ()
    changes: dict[str, int] = field(default_factory=dict)


_PLAIN = (Update(4, 2048), Update(4, 2048, True), Update(1, 2048), Update(2, 4096, True))


def jobs(device: str, processes: int, slot: int) -> list[Job]:
    """What group ``slot`` of ``processes`` processes measures on ``device``."""
    if device == "cpu":
        return _cpu_jobs(processes)
    table = {1: _ONE, 2: _TWO, 4: _FOUR}
    return list(table[processes][slot]) if slot < len(table[processes]) else []


_ONE: tuple[tuple[Job, ...], ...] = (
    (
        Job(
            "qwen2.5-1.5b",
            "image",
            updates=(*_PLAIN, Update(4, 2048, ragged=False), Update(8, 512)),
            decodes=(Decode(64), Decode(256), Decode(16)),
        ),
        Job("qwen2.5-1.5b", "packed", updates=_PLAIN[:2], decodes=(Decode(64), Decode(256))),
    ),
    (
        Job(
            "qwen2.5-3b",
            "image",
            updates=(Update(2, 2048), Update(4, 2048, True), Update(1, 2048)),
            decodes=(Decode(64), Decode(256)),
        ),
        Job(
            "qwen2.5-3b",
            "packed",
            updates=(Update(2, 2048), Update(4, 2048, True)),
            decodes=(Decode(64),),
        ),
    ),
    (
        Job("qwen2.5-0.5b", "image", updates=_PLAIN, decodes=(Decode(64), Decode(256))),
        Job(
            "qwen2.5-14b",
            "packed",
            updates=(Update(1, 2048, True), Update(2, 2048, True)),
            decodes=(Decode(64),),
        ),
        Job("qwen2.5-0.5b", "packed", updates=_PLAIN[:2], decodes=(Decode(64),)),
        Job("qwen2.5-1.5b", "image", zero=2, updates=(Update(2, 2048),)),
        Job("qwen2.5-1.5b", "image", zero=3, updates=(Update(2, 2048),)),
    ),
    (
        Job(
            "qwen2.5-7b",
            "image",
            updates=(Update(1, 2048), Update(4, 2048, True), Update(2, 2048)),
            decodes=(Decode(64),),
        ),
        Job(
            "qwen2.5-7b",
            "packed",
            updates=(Update(1, 2048), Update(4, 2048, True)),
            decodes=(Decode(64),),
        ),
    ),
)
_SMALL = (Update(2, 2048),)
_TWO = (
    (
        Job("qwen2.5-1.5b", "image", zero=0, updates=_SMALL),
        Job("qwen2.5-1.5b", "image", zero=3, updates=(Update(2, 2048), Update(2, 2048, True))),
        Job("qwen2.5-1.5b", "image", zero=1, updates=_SMALL),
        Job("qwen2.5-1.5b", "image", zero=2, updates=_SMALL),
    ),
    (
        Job("qwen2.5-3b", "image", zero=2, bucket=50_000_000, updates=_SMALL),
        Job("qwen2.5-1.5b", "packed", zero=3, updates=_SMALL),
        Job("qwen2.5-3b", "packed", zero=3, updates=(Update(2, 2048, True),)),
        Job("qwen2.5-1.5b", "packed", zero=2, updates=_SMALL),
    ),
)
_FOUR = (
    (
        Job("qwen2.5-1.5b", "image", zero=3, updates=_SMALL),
        Job("qwen2.5-1.5b", "image", zero=0, updates=_SMALL),
        Job("qwen2.5-3b", "image", zero=3, updates=(Update(2, 2048), Update(4, 2048, True))),
        Job("qwen2.5-7b", "packed", zero=3, updates=(Update(2, 2048, True),)),
        Job("qwen2.5-7b", "image", zero=3, updates=(Update(2, 2048, True),)),
        Job("qwen2.5-3b", "image", zero=2, updates=_SMALL),
    ),
)


def _cpu_jobs(processes: int) -> list[Job]:
    """Qwen2.5's architecture, narrow: seconds on one core."""
    shapes = (
        {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4},
        {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6},
    )
    common = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 4096}
    plain = (Update(4, 256), Update(4, 256, True), Update(2, 128), Update(8, 256, True))
    if processes > 1:
        return [
            Job("qwen2.5-1.5b", "image", zero=zero, updates=plain[:1], changes=common | shapes[0])
            for zero in (0, 2, 3)
        ]
    return [
        Job(
            "qwen2.5-1.5b",
            storage,
            updates=plain,
            decodes=(Decode(8, 64), Decode(32, 64)),
            changes=common | shape,
        )
        for shape in shapes
        for storage in ("image", "packed")
    ]
