"""The emulation itself: what it computes, and that it shows what a GPU may hide."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from loraplex.kernels.launch import Argument, Kernel

from .emulation.launcher import EmulatedLauncher, EmulationFailed, missing
from .test_sanitized import run

Run = Callable[..., None]


@pytest.fixture
def launch(tmp_path: Path) -> Run:
    """Launch the kernel `probe` with this body: its parameters, its code, and its arguments."""
    if (why := missing()) is not None:
        pytest.skip(why)

    def launch(
        parameters: str,
        body: str,
        *arguments: Argument | torch.Tensor,
        grid: tuple[int, int, int] = (1, 1, 1),
        block: int = 32,
    ) -> None:
        source = tmp_path / "probe.cu"
        head = '#include "ptx.cuh"\nusing T = ELEMENT;\n'
        source.write_text(f'{head}extern "C" __global__ void probe({parameters}) {{\n{body}\n}}\n')
        launcher = EmulatedLauncher(replacements={"probe.cu": source})
        addresses = [each.data_ptr() if isinstance(each, torch.Tensor) else each for each in arguments]
        launcher.launch(Kernel("probe.cu", "probe", (("ELEMENT", "Bf16"),)), grid, block, addresses)

    return launch


def test_a_product_of_fragments_is_exact(launch: Run) -> None:
    torch.manual_seed(0)
    a, b = torch.randint(-8, 8, (16, 16)).bfloat16(), torch.randint(-8, 8, (16, 8)).bfloat16()
    d = torch.randint(-99, 99, (16, 8)).float()
    want = d.double() + a.double() @ b.double()
    body = """
    const int g = threadIdx.x / 4, t = threadIdx.x % 4;
    unsigned fa[4], fb[2];
    for (int i = 0; i < 4; ++i) fa[i] = *(const unsigned *)(a + (g + i % 2 * 8) * 16 + t * 2 + i / 2 * 8);
    for (int i = 0; i < 2; ++i) {
        const T *at = b + (t * 2 + i * 8) * 8 + g;
        fb[i] = at[0].bits | (unsigned)at[8].bits << 16;
    }
    float *near = d + g * 8 + t * 2, *far = near + 64;
    float sum[4] = {near[0], near[1], far[0], far[1]};
    mma_m16n8k16<T>(sum, fa, fb);
    near[0] = sum[0], near[1] = sum[1], far[0] = sum[2], far[1] = sum[3];"""
    launch("const T *a, const T *b, float *d", body, a, b, d)
    assert torch.equal(d.double(), want)


@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_from_shared_memory(transposed: bool, launch: Run) -> None:
    matrices = torch.arange(256, dtype=torch.int16).view(4, 8, 8)
    got = torch.zeros(4, 32, 2, dtype=torch.int16)
    body = f"""
    __shared__ __align__(16) unsigned short rows[32][8];
    for (int i = 0; i < 8; ++i) rows[threadIdx.x][i] = x[threadIdx.x * 8 + i];
    __syncwarp();
    unsigned r[4];
    ldmatrix_x4{"_trans" if transposed else ""}(r, rows[threadIdx.x]);
    for (int i = 0; i < 4; ++i) out[i * 32 + threadIdx.x] = r[i];"""
    launch("const unsigned short *x, unsigned *out", body, matrices, got)
    assert torch.equal(got.view(4, 8, 8), matrices.mT if transposed else matrices)


def test_values_move_between_lanes(launch: Run) -> None:
    got = torch.zeros(3, 64, dtype=torch.int32)
    body = """
    const int i = threadIdx.x;
    out[i] = __shfl_sync(0xffffffff, i, 5);
    out[64 + i] = __shfl_xor_sync(0xffffffff, i, 9);
    out[128 + i] = (int)__shfl_down_sync(0xffffffff, (float)i, 4);"""
    launch("int *out", body, got, block=64)
    lane, warp = torch.arange(64) % 32, torch.arange(64) // 32 * 32
    want = [5 + warp, (lane ^ 9) + warp, torch.where(lane + 4 < 32, lane + 4, lane) + warp]
    assert torch.equal(got.long(), torch.stack(want))


@pytest.mark.parametrize("grid", [(5, 1, 1), (2, 3, 4)])
def test_every_block_runs_once(grid: tuple[int, int, int], launch: Run) -> None:
    count = grid[0] * grid[1] * grid[2]
    got = torch.zeros(count, 3, dtype=torch.int32)
    body = """
    const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    if (threadIdx.x < 3) out[block * 3 + threadIdx.x] += threadIdx.x + blockDim.x;"""
    launch("int *out", body, got, grid=grid)
    assert torch.equal(got, torch.tensor([[32, 33, 34]] * count, dtype=torch.int32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounding_is_torchs(dtype: torch.dtype, launch: Run) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    finite = every[every.isfinite()].sort().values
    middles = (finite[1:] + finite[:-1]) / 2
    limits = torch.tensor([torch.inf, -torch.inf, 65519.0, 65520.0, -0.0])
    x = torch.cat([finite, middles, middles.nextafter(finite[1:]), limits])
    got, back = torch.empty(len(x), dtype=dtype), torch.empty(len(x))
    name = "Fp16" if dtype == torch.float16 else "Bf16"
    body = f"""
    for (int i = threadIdx.x; i < n; i += 32) {{
        y[i] = from_float<{name}>(x[i]);
        z[i] = to_float(y[i]);
    }}"""
    launch(f"const float *x, {name} *y, float *z, int n", body, x, got, back, np.int32(len(x)))
    assert torch.equal(got, x.to(dtype))
    assert torch.equal(back, x.to(dtype).float())


COPY = """
    __shared__ __align__(16) unsigned cells[64][4];
    const int i = threadIdx.x;
    cp_async_16(cells[i], x + i * 4, i % 2 == 0);
    cp_async_commit();
    {wait}
    __syncthreads();
    for (int j = 0; j < 4; ++j) out[i * 4 + j] = cells[63 - i][j];"""


@pytest.mark.parametrize(
    ("wait", "arrives"), [("cp_async_wait<0>();", True), ("cp_async_wait<1>();", False), ("", False)]
)
def test_a_copy_arrives_when_it_is_waited_for(wait: str, arrives: bool, launch: Run) -> None:
    x = torch.arange(1, 257, dtype=torch.int32).view(64, 4)
    got = torch.zeros_like(x)
    launch("const unsigned *x, unsigned *out", COPY.format(wait=wait), x, got, block=64)
    copied = torch.where(torch.arange(64)[:, None] % 2 == 0, x, 0).flip(0)
    assert torch.equal(got, copied if arrives else torch.full_like(x, -1))


def test_shared_memory_is_nan_before_every_block(launch: Run) -> None:
    got = torch.zeros(3, 32)
    body = """
    __shared__ float cells[32];
    out[blockIdx.x * 32 + threadIdx.x] = cells[threadIdx.x];
    cells[threadIdx.x] = 1.0f;"""
    launch("float *out", body, got, grid=(3, 1, 1))
    assert got.isnan().all()


@pytest.mark.parametrize("reads", ["63 - i", "(i + 1) % 64", "(i + 63) % 64"])
def test_a_missing_barrier_shows(reads: str, launch: Run) -> None:
    body = f"""
    __shared__ float cells[64];
    const int i = threadIdx.x;
    cells[i] = i;
    {{barrier}}
    out[blockIdx.x * 64 + i] = cells[{reads}];"""
    for barrier, whole in (("__syncthreads();", True), ("", False)):
        got = torch.zeros(2, 64)
        launch("float *out", body.replace("{barrier}", barrier), got, grid=(2, 1, 1), block=64)
        assert bool(got.isfinite().all()) is whole
        assert got.isnan().any(dim=1).all() != whole


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (
            "if (threadIdx.x != 3) __syncthreads();",
            "32 .* __syncthreads at probe.cu:4; 1 .the first is 3. gone",
        ),
        ("if (threadIdx.x < 5)\n__syncthreads();\nelse __syncthreads();", "probe.cu:5; 28 .* probe.cu:6"),
        ("if (threadIdx.x % 2) __syncwarp();", "__syncwarp at probe.cu:4"),
        ("if (threadIdx.x % 2) __syncwarp(); else __shfl_sync(~0u, 1, 0);", "__shfl_sync at probe.cu:4"),
        ("__shfl_xor_sync(~0u, 1, 1);", "thread 32, __shfl_xor_sync at probe.cu:4: there is no lane 1"),
        ("unsigned r[4]; ldmatrix_x4(r, x);", "ldmatrix at probe.cu:4: an address outside of shared memory"),
        ("load_16((char *)x + 4);", "load at probe.cu:4: an address that is no multiple of 16"),
        (
            "float d[4]; unsigned a[4], b[2]; mma_m16n8k16<T>(d, a, b);",
            "mma at probe.cu:4: the warp is not whole",
        ),
        ("cp_async_16(x, x, true);", "cp.async at probe.cu:4: an address outside of shared memory"),
    ],
)
def test_what_cuda_forbids_raises(body: str, told: str, launch: Run) -> None:
    """In a block of 33 threads; the next launch is none the worse for it."""
    x = torch.zeros(64, dtype=torch.int32)
    with pytest.raises(EmulationFailed, match=told):
        launch("int *x", body, x, block=33)
    launch("int *x", "x[threadIdx.x] = 1; __syncthreads();", x, block=33)
    assert x.sum() == 33


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((np.int32(1),), "number of arguments"),
        ((np.int32(1), 2), "size"),
        ((np.float32(1), np.int32(1)), "size"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    arguments: tuple[Argument, ...], told: str, launch: Run
) -> None:
    with pytest.raises(EmulationFailed, match=rf"probe of probe.cu: .*{told}"):
        launch("long long x, int y", "", *arguments)


def test_an_error_of_the_compiler_names_its_line(launch: Run) -> None:
    with pytest.raises(EmulationFailed, match=r"does not compile:(?s:.)*probe.cu:4:.*nothing"):
        launch("int *x", "x[0] = nothing;", torch.zeros(1, dtype=torch.int32))


SANITIZED_PROBE = """
import pathlib
import numpy as np
from loraplex.kernels.launch import Kernel
from tests.kernels.emulation.launcher import SANITIZED, EmulatedLauncher
source = pathlib.Path("{folder}") / "probe.cu"
source.write_text('extern "C" __global__ void probe(unsigned *x) {{\\n{body}\\n}}\\n')
x = np.zeros(32, np.int32)
EmulatedLauncher(flags=SANITIZED, replacements={{"probe.cu": source}}).launch(
    Kernel("probe.cu", "probe"), (1, 1, 1), 32, [x.ctypes.data]
)
print("unnoticed")
"""


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("x[threadIdx.x] = 1;", "unnoticed"),
        ("x[threadIdx.x + 1] = 1;", "heap-buffer-overflow"),
        ("x[threadIdx.x] = x[(int)threadIdx.x - 1];", "heap-buffer-overflow"),
        ("__shared__ unsigned y[32]; unsigned *at = y; at[threadIdx.x + 1] = 1;", "global-buffer-overflow"),
        ("*(uint4 *)(x + 1) = make_uint4(1, 1, 1, 1);", "misaligned address"),
    ],
)
def test_sanitizers_name_the_line(body: str, told: str, tmp_path: Path) -> None:
    answer = run(SANITIZED_PROBE.format(folder=tmp_path, body=body))
    assert told in answer.stdout + answer.stderr, answer.stderr[-3000:]
    assert told == "unnoticed" or "probe.cu:2" in answer.stderr, answer.stderr[-3000:]
