"""The C++ extension, whose sources are in native/.

Addresses and counts are ints; elements are 0 for float32 and 1 for bfloat16.
"""

RECORD_BYTES: int
"""Of one `Adapter` in lora_tables.cuh."""

LAYER_BYTES: int
"""Of one `Layer` in native/calls.h."""
PANEL: int
"""Outputs whose weights `gemm` wants together; 0 where this processor has no instructions for it."""

def levels() -> tuple[str, ...]:
    """Sets of instructions that this processor has, the best first, which is used."""

def use(level: str, /) -> None:
    """Use another one in the whole process. Raises ValueError for one that is not among `levels`."""

def lora(
    element: int,
    y: int,
    y_stride: int,
    columns: int,
    x: int,
    x_stride: int,
    in_features: int,
    hidden: int,
    tasks: int,
    table: int,
    table_stride: int,
    shares: int,
    /,
) -> None: ...
def norm(
    element: int, out: int, x: int, added: int, weight: int, rows: int, width: int, eps: float, /
) -> None: ...
def gate(element: int, out: int, gate_up: int, rows: int, width: int, /) -> None: ...
def rope(
    element: int,
    q: int,
    keys: int,
    values: int,
    qkv: int,
    qkv_stride: int,
    cos: int,
    sin: int,
    slots: int,
    rows: int,
    heads: int,
    kv_heads: int,
    dim: int,
    /,
) -> None: ...
def gemm(
    y: int, x: int, weight: int, bias: int, x_stride: int, rows: int, inputs: int, outputs: int, /
) -> None: ...
def stack(
    layers: int,
    count: int,
    rows: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    dim: int,
    block_size: int,
    residual: int,
    added: int,
    cos: int,
    sin: int,
    slots: int,
    tables: int,
    table_stride: int,
    lengths: int,
    tasks: int,
    lora_hidden: int,
    slot_stride: int,
    normed: int,
    qkv: int,
    q: int,
    attended: int,
    gate_up: int,
    gated: int,
    /,
) -> None: ...
def attention(
    element: int,
    out: int,
    q: int,
    keys: int,
    values: int,
    tables: int,
    table_stride: int,
    lengths: int,
    rows: int,
    heads: int,
    kv_heads: int,
    dim: int,
    block_size: int,
    scale: float,
    softcap: float,
    window: int,
    /,
) -> None: ...
