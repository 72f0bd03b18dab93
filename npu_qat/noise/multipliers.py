"""Which layers get how much of the noise.

Uniform noise treats every decoder layer alike. Guided noise gives layer ``l`` the standard
deviation ``sigma m_l``, where ``m_l`` comes from a table of layer indices (a sensitivity scan
writes it) and, if there is a zone schedule, from the layer's zone and the phase of the run::

    m_l(t) = listed_l * zone_l(t) / mean

* ``listed_l``: ``layer_multipliers[l]``, or ``default_multiplier`` for layers not listed. A default
  of 0 with a few layers listed is the "targeted" variant, a table of all layers the "variable" one.
* ``zone_l(t)``: the early or late multiplier of the edge or middle zone; early are the steps
  ``t < phase_boundary_ratio * total_steps``. Layers in no zone have 1.
* ``mean``: with ``normalize``, the mean of ``listed * zone`` over all decoder layers at that step,
  so that guidance moves noise between layers and adds none in total; otherwise 1.

The final norm lies in no layer: it has ``default_multiplier`` (over the same mean) and no zone. So
a targeted configuration leaves it clean, and the uniform one does not.
"""

from __future__ import annotations

from collections.abc import Iterable

from npu_qat.config import LayerSigma


class LayerMultipliers:
    """Multiplier of sigma for each decoder layer of one model, at each step.

    Args:
        config: the ``noise.layers`` section.
        layers: indices of the decoder layers that the model has.

    Raises ``ValueError`` if the configuration names layers that the model does not have, puts one
    in two zones, or leaves every layer at 0 for the whole run.
    """

    def __init__(self, config: LayerSigma, layers: Iterable[int]) -> None:
        self.config = config
        self.layers = tuple(sorted(set(layers)))
        if config.enabled:
            self._check_names()

    def multiplier(self, layer: int | None, step: int, total_steps: int) -> float:
        """Multiplier of ``layer`` (None: a norm outside of the layers) at ``step`` from 0."""
        if not self.config.enabled:
            return 1.0
        raw = self._raw(layer, step, total_steps)
        if not self.config.normalize:
            return raw
        mean = sum(self._raw(i, step, total_steps) for i in self.layers) / len(self.layers)
        if mean == 0.0:
            raise ValueError(
                f"noise.layers.normalize: at step {step} the multipliers of all layers are 0, "
                "which no factor brings to mean 1; give some layer a multiplier above 0"
            )
        return raw / mean

    def _raw(self, layer: int | None, step: int, total_steps: int) -> float:
        c = self.config
        if layer is None:
            return c.default_multiplier
        return c.layer_multipliers.get(layer, c.default_multiplier) * self._zone(
            layer, step, total_steps
        )

    def _zone(self, layer: int, step: int, total_steps: int) -> float:
        zones = self.config.zone_schedule
        if zones is None:
            return 1.0
        early = step < zones.phase_boundary_ratio * total_steps
        if layer in zones.edge_layers:
            return zones.early_edge_multiplier if early else zones.late_edge_multiplier
        if layer in zones.middle_layers:
            return zones.early_middle_multiplier if early else zones.late_middle_multiplier
        return 1.0

    def _check_names(self) -> None:
        c = self.config
        self._check_exist("layer_multipliers", c.layer_multipliers)
        if c.zone_schedule is not None:
            edge, middle = c.zone_schedule.edge_layers, c.zone_schedule.middle_layers
            self._check_exist("zone_schedule.edge_layers", edge)
            self._check_exist("zone_schedule.middle_layers", middle)
            if both := sorted(set(edge) & set(middle)):
                raise ValueError(
                    f"noise.layers.zone_schedule: layers {both} are in edge_layers and in "
                    "middle_layers; put each in one zone"
                )
        listed = [c.layer_multipliers.get(i, c.default_multiplier) for i in self.layers]
        if not any([*listed, c.default_multiplier]):
            raise ValueError(
                "noise.layers: every multiplier is 0, so there would be no noise; "
                "set noise.enabled: false if that is meant"
            )

    def _check_exist(self, key: str, named: Iterable[int]) -> None:
        if unknown := sorted(set(named) - set(self.layers)):
            raise ValueError(
                f"noise.layers.{key} names layers {unknown}, but this model has "
                f"{len(self.layers)} decoder layers, {_span(self.layers)}"
            )


def _span(layers: tuple[int, ...]) -> str:
    return f"{layers[0]} to {layers[-1]}" if layers else "none with a norm"
