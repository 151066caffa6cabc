"""LoKr: a Kronecker product of two small matrices, either of them possibly a low-rank product itself."""

from __future__ import annotations

import numpy as np

from ...errors import AdapterRejected
from ..changes import LinearChange, ParsedAdapter, Placed
from ..layout import Target
from ..safetensors_header import TensorInfo
from ..tensors import Tensors
from .files import AdapterFiles
from .low_rank import Cut, Float64, cut, thin_svd
from .lycoris import LycorisFields, read_lycoris_fields, traits
from .modules import KeyForm, ModuleTensors, expect_shape, modules_of

_FORM = KeyForm("LoKr", Target, ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"))


def read_lokr(files: AdapterFiles) -> ParsedAdapter:
    """Read a LOKR adapter as LoRA of the product of its factors' ranks."""
    fields, warnings = read_lycoris_fields(files.config)
    modules = modules_of(files, _FORM, fields.selection())
    products = [_Kronecker(files, module, fields) for module in modules]
    placed = tuple(product.placed() for product in products)
    cuts = {product.target.name: product.cut for product in products}
    return ParsedAdapter(placed, traits("LoKr", cuts, warnings))


class _Factor:
    """One side of the product: w1 or w2, whole or as w_a w_b."""

    def __init__(self, tensors: Tensors, module: ModuleTensors[Target], name: str, rank: int) -> None:
        """Raises AdapterRejected where both forms or neither are there, or where they do not fit together."""
        self._tensors = tensors
        if name in module:
            if f"{name}_a" in module or f"{name}_b" in module:
                raise AdapterRejected(f"{module[name].key} is there whole and in parts; keep one")
            self._keys = [_matrix(module[name]).key]
            self.out_features, self.in_features = module[name].shape
            self.rank = min(module[name].shape)
        else:
            a, b = _matrix(module[f"{name}_a"]), _matrix(module[f"{name}_b"])
            expect_shape(a, a.shape[0], rank)
            expect_shape(b, rank, b.shape[1])
            self._keys = [a.key, b.key]
            self.out_features, self.in_features = a.shape[0], b.shape[1]
            self.rank = rank

    def product(self) -> tuple[Float64, Float64]:
        """[out, rank] and [rank, in] whose product it is."""
        first, *second = (self._tensors.read(key).astype(np.float64) for key in self._keys)
        if second:
            return first, second[0]
        if self.out_features < self.in_features:
            return np.eye(self.out_features), first
        return first, np.eye(self.in_features)


class _Kronecker:
    """One module: w1 ⊗ w2."""

    def __init__(self, files: AdapterFiles, module: ModuleTensors[Target], fields: LycorisFields) -> None:
        """Raises AdapterRejected where shapes or rank do not fit. Reads values only to cut the rank."""
        self.target = module.target
        rank = fields.rank_of(module.path)
        self._scale = fields.scale_of(module.path)
        self._w1 = _Factor(files.tensors, module, "lokr_w1", rank)
        self._w2 = _Factor(files.tensors, module, "lokr_w2", rank)
        self._check_shape()
        rank = self._w1.rank * self._w2.rank
        self._is_whole = rank <= files.layout.max_rank
        if self._is_whole:
            self.cut = Cut(rank, 0.0)
        else:
            (_, s1, _), (_, s2, _) = (thin_svd(*factor.product()) for factor in (self._w1, self._w2))
            singular = np.sort(np.outer(s1, s2), axis=None)[::-1]
            self.cut = cut(self.target.name, singular, files.layout.max_rank)

    def placed(self) -> Placed:
        return Placed(self.target, self.cut.rank, self._build)

    def _check_shape(self) -> None:
        shape = [self._w1.out_features * self._w2.out_features, self._w1.in_features * self._w2.in_features]
        wanted = [self.target.out_features, self.target.in_features]
        if shape != wanted:
            raise AdapterRejected(
                f"{self.target.name}: its lokr tensors make a delta of shape {shape}, the base has {wanted}; "
                "it was made for another base"
            )

    def _build(self) -> LinearChange:
        b, a = self._whole() if self._is_whole else self._largest()
        with np.errstate(over="ignore"):
            return LinearChange(a=a.astype(np.float32), b=(b * self._scale).astype(np.float32))

    def _whole(self) -> tuple[Float64, Float64]:
        (b1, a1), (b2, a2) = self._w1.product(), self._w2.product()
        return np.kron(b1, b2).astype(np.float64), np.kron(a1, a2).astype(np.float64)

    def _largest(self) -> tuple[Float64, Float64]:
        """The largest singular components: those of a Kronecker product are the products of its factors'."""
        u1, s1, v1 = thin_svd(*self._w1.product())
        u2, s2, v2 = thin_svd(*self._w2.product())
        singular = np.outer(s1, s2)
        kept = np.argsort(singular, axis=None)[::-1][: self.cut.rank]
        first, second = np.unravel_index(kept, singular.shape)
        u = (u1[:, None, first] * u2[None, :, second]).reshape(-1, len(kept))
        v = (v1[first][:, :, None] * v2[second][:, None, :]).reshape(len(kept), -1)
        return u * singular[first, second], v


def _matrix(tensor: TensorInfo) -> TensorInfo:
    if len(tensor.shape) != 2 or 0 in tensor.shape:
        raise AdapterRejected(f"{tensor.key} has shape {list(tensor.shape)}; a matrix is needed")
    return tensor
