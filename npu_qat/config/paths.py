"""Module paths such as ``model.layers.12.self_attn.q_proj``, compared segment by segment.

Configurations name modules by pattern: which linears stay in 16 bits, which norms get no noise. A
substring test is the obvious way to match them and a trap: ``"layers.2" in name`` also takes
layers 20 to 27, and nothing ever says so. Here a path is split at its dots, and a pattern matches
if its segments equal a run of neighbouring segments anywhere in the path:

=========================  ==================================  ===========================
pattern                    matches                             does not match
=========================  ==================================  ===========================
``lm_head``                ``lm_head``                         ``my_lm_head``
``layers.2``               ``model.layers.2.mlp.up_proj``      ``model.layers.20.mlp.up_proj``
``layers.*.mlp``           ``model.layers.7.mlp.up_proj``      ``model.layers.7.self_attn.q_proj``
``q_proj``                 ``layers.0.self_attn.q_proj``       ``layers.0.self_attn.q_proj_bias``
=========================  ==================================  ===========================

"Anywhere" and not "at the start", because wrappers put segments in front (``base_model.model.``
under PEFT, ``module.`` under DeepSpeed) and behind (``.base_layer``). ``*`` stands for exactly one
whole segment; there are no partial wildcards and no regular expressions.
"""

from __future__ import annotations

from collections.abc import Iterable


def match_path(path: str, pattern: str) -> bool:
    """Whether the segments of ``pattern`` occur as neighbours somewhere in ``path``.

    Raises ``ValueError`` for a pattern with an empty segment (``""``, ``"layers..mlp"``) or with a
    ``*`` that is only part of a segment (``"layers.1*"``), which would silently match nothing.
    """
    wanted = _pattern_segments(pattern)
    segments = path.split(".")
    starts = range(len(segments) - len(wanted) + 1)
    return any(
        all(w in ("*", s) for w, s in zip(wanted, segments[start:], strict=False))
        for start in starts
    )


def match_any(path: str, patterns: Iterable[str]) -> bool:
    """Whether at least one of ``patterns`` matches ``path``."""
    return any(match_path(path, pattern) for pattern in patterns)


def layer_index(path: str) -> int | None:
    """Index of the decoder layer that ``path`` lies in, or None outside of the layers.

    It is the first segment made of digits: 12 in ``model.layers.12.mlp.experts.3.up_proj``, 5 in
    ``transformer.h.5.attn``, None in ``model.norm`` and ``lm_head``.
    """
    return next((int(s) for s in path.split(".") if s.isascii() and s.isdigit()), None)


def _pattern_segments(pattern: str) -> list[str]:
    segments = pattern.split(".")
    if "" in segments:
        raise ValueError(
            f"module pattern {pattern!r} has an empty segment; write dot-separated names, "
            "e.g. 'lm_head' or 'layers.*.mlp.down_proj'"
        )
    for segment in segments:
        if "*" in segment and segment != "*":
            raise ValueError(
                f"module pattern {pattern!r}: '*' stands for one whole segment, "
                f"so {segment!r} matches nothing; list the names one by one"
            )
    return segments
