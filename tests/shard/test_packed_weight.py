"""The forms in which base weights are multiplied: the same products and the same weights, held once."""

from __future__ import annotations

import pytest
import torch

from loraplex.shard import packed_weight
from loraplex.shard.linear import BaseWeight, DenseWeight
from loraplex.shard.packed_weight import OneDnnWeight, PanelWeight, packed

native_linear = packed_weight.native_linear
FORMS = {
    "panels": pytest.param(
        PanelWeight,
        marks=pytest.mark.skipif(
            native_linear is None or not native_linear.IS_SERVED,
            reason="the extension was not built, or this processor multiplies no pairs of bfloat16",
        ),
        id="panels",
    ),
    "oneDNN": pytest.param(
        OneDnnWeight,
        marks=pytest.mark.skipif(
            not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
            reason="oneDNN has no bfloat16 on this processor",
        ),
        id="oneDNN",
    ),
}


@pytest.fixture(params=FORMS.values())
def form(request: pytest.FixtureRequest) -> type[PanelWeight] | type[OneDnnWeight]:
    return request.param  # type: ignore[no-any-return]


def weight(dtype: torch.dtype, outputs: int = 40, inputs: int = 24, *, bias: bool = True) -> DenseWeight:
    scaled = torch.randn(outputs, inputs) / inputs**0.5
    return DenseWeight(scaled.to(dtype), torch.randn(outputs).to(dtype) if bias else None)


def check(served: BaseWeight, dense: DenseWeight, x: torch.Tensor) -> None:
    want = x.double() @ dense.weight.double().T + (0 if dense.bias is None else dense.bias.double())
    got = served.apply(x)
    assert got.dtype == x.dtype
    torch.testing.assert_close(got.double(), want, rtol=2.0**-7, atol=2.0**-8)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [0, 1, 7, 8, 9, 17, 130])
@pytest.mark.parametrize(("outputs", "inputs"), [(40, 24), (32, 2), (1, 768), (1000, 66), (49, 130)])
@torch.inference_mode()
def test_products_are_those_of_the_plain_weight(
    outputs: int, inputs: int, rows: int, bias: bool, form: type[PanelWeight] | type[OneDnnWeight]
) -> None:
    dense = weight(torch.bfloat16, outputs, inputs, bias=bias)
    served = form(dense)
    assert served.out_features == outputs
    check(served, dense, torch.randn(rows, inputs).bfloat16())


@torch.inference_mode()
def test_rows_of_a_wider_matrix(form: type[PanelWeight] | type[OneDnnWeight]) -> None:
    dense = weight(torch.bfloat16)
    check(form(dense), dense, torch.randn(5, 60).bfloat16()[:, 10:34])
    check(form(dense), dense, torch.randn(24, 5).bfloat16().T)


@torch.inference_mode()
def test_a_row_is_the_same_in_any_company(form: type[PanelWeight] | type[OneDnnWeight]) -> None:
    if form is OneDnnWeight:
        pytest.skip("oneDNN chooses its kernel by the number of rows")
    served, x = form(weight(torch.bfloat16, 70, 300)), torch.randn(40, 300).bfloat16()
    together = served.apply(x)
    for row in (0, 7, 8, 39):
        assert torch.equal(served.apply(x[row : row + 1])[0], together[row])


@torch.inference_mode()
def test_what_is_not_finite_stays_in_its_row(form: type[PanelWeight] | type[OneDnnWeight]) -> None:
    x = torch.randn(9, 24).bfloat16()
    x[4, 3] = torch.nan
    got = form(weight(torch.bfloat16)).apply(x)
    assert got[4].isnan().all()
    assert got[[0, 1, 2, 3, 5, 6, 7, 8]].isfinite().all()


@pytest.mark.parametrize(("outputs", "inputs"), [(40, 24), (31, 6), (64, 2)])
def test_the_plain_weight_can_be_had_again(
    outputs: int, inputs: int, form: type[PanelWeight] | type[OneDnnWeight]
) -> None:
    dense = weight(torch.bfloat16, outputs, inputs)
    assert torch.equal(form(dense).dense(), dense.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_other_weights_stay_as_they_are(dtype: torch.dtype) -> None:
    dense = weight(dtype)
    assert packed(dense) is dense


def test_the_form_is_the_one_that_suits_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert not isinstance(packed(weight(torch.bfloat16)), PanelWeight)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    serves = native_linear is not None and native_linear.IS_SERVED
    assert isinstance(packed(weight(torch.bfloat16)), PanelWeight) is serves
    assert not isinstance(packed(weight(torch.bfloat16, inputs=25)), PanelWeight)
    monkeypatch.setattr(packed_weight, "native_linear", None)
    assert not isinstance(packed(weight(torch.bfloat16)), PanelWeight)
