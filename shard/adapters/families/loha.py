"""LoHa: the elementwise product of two low-rank deltas, which is a delta of at most their ranks' product."""

from __future__ import annotations

import numpy as np

from ..changes import LinearChange, ParsedAdapter, Placed
from ..layout import Target
from .files import AdapterFiles
from .low_rank import Cut, Float64, cut, thin_svd
from .lycoris import LycorisFields, read_lycoris_fields, traits
from .modules import KeyForm, ModuleTensors, expect_shape, modules_of

_FORM = KeyForm("LoHa", Target, ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"))


def read_loha(files: AdapterFiles) -> ParsedAdapter:
    """Read a LOHA adapter as LoRA of its rank squared, or of the layer's own rank where that is less."""
    fields, warnings = read_lycoris_fields(files.config)
    modules = modules_of(files, _FORM, fields.selection())
    hadamards = [_Hadamard(files, module, fields) for module in modules]
    placed = tuple(hadamard.placed() for hadamard in hadamards)
    cuts = {hadamard.target.name: hadamard.cut for hadamard in hadamards}
    return ParsedAdapter(placed, traits("LoHa", cuts, warnings))


class _Hadamard:
    """One module: (w1_a w1_b) * (w2_a w2_b), elementwise."""

    def __init__(self, files: AdapterFiles, module: ModuleTensors[Target], fields: LycorisFields) -> None:
        """Raises AdapterRejected where shapes or rank do not fit. Reads values only to cut the rank."""
        self.target = module.target
        self._tensors = files.tensors
        self._rank = fields.rank_of(module.path)
        self._scale = fields.scale_of(module.path)
        self._keys = {part: module[part].key for part in _FORM.parts}
        for part in ("hada_w1_a", "hada_w2_a"):
            expect_shape(module[part], self.target.out_features, self._rank)
        for part in ("hada_w1_b", "hada_w2_b"):
            expect_shape(module[part], self._rank, self.target.in_features)
        rank = min(self._rank**2, self.target.out_features, self.target.in_features)
        self._is_whole = rank <= files.layout.max_rank
        if self._is_whole:
            self.cut = Cut(rank, 0.0)
        else:
            singular = thin_svd(*self._factors())[1]
            self.cut = cut(self.target.name, singular, files.layout.max_rank)

    def placed(self) -> Placed:
        return Placed(self.target, self.cut.rank, self._build)

    def _build(self) -> LinearChange:
        b, a = self._factors()
        if not self._is_whole:
            u, s, v = thin_svd(b, a)
            b, a = u[:, : self.cut.rank] * s[: self.cut.rank], v[: self.cut.rank]
        with np.errstate(over="ignore"):
            return LinearChange(a=a.astype(np.float32), b=(b * self._scale).astype(np.float32))

    def _factors(self) -> tuple[Float64, Float64]:
        """[out, k] and [k, in] whose product is the delta before its scale."""
        w1_a, w1_b, w2_a, w2_b = (
            self._tensors.read(self._keys[part]).astype(np.float64) for part in _FORM.parts
        )
        out_features, in_features = self.target.out_features, self.target.in_features
        if self._rank**2 <= min(out_features, in_features):
            # Sum over i, j of (w1_a[:, i] * w2_a[:, j]) (w1_b[i] * w2_b[j]).
            b = (w1_a[:, :, None] * w2_a[:, None, :]).reshape(out_features, -1)
            return b, (w1_b[:, None, :] * w2_b[None, :, :]).reshape(-1, in_features)
        delta = (w1_a @ w1_b) * (w2_a @ w2_b)
        if out_features < in_features:
            return np.eye(out_features), delta
        return delta, np.eye(in_features)
