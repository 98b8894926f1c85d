"""What the norm kernels share: launch configurations and how parameters are loaded."""

import dataclasses

import triton
import triton.language as tl

from flamingo_fast.kernels.launch import Target, cdiv, next_power_of_2

# Above this width the parameters and their gradients' sums do not fit in registers.
WIDEST_KEPT = 4096

# What a thread of the largest configuration has, and more than any other needs.
MAX_REGISTERS = 128


@dataclasses.dataclass(frozen=True)
class NormConfig:
    """Never depends on the number of rows: a row's result must not on the rows beside it."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    programs_per_sm: int

    @property
    def keep_parameters(self) -> bool:
        """Whether a program keeps its parameters in registers from row to row; wider ones spill."""
        return self.BLOCK_N <= WIDEST_KEPT

    def programs(self, rows: int, target: Target) -> int:
        return min(cdiv(rows, self.BLOCK_M), target.num_sms * self.programs_per_sm)


# What a file of tuned configurations may say of a norm; see `tuned.tunable`.
TUNED = dict(fixed=("BLOCK_N",), bounds={"BLOCK_M": (1, 2048)}, classes={"width": next_power_of_2})


@triton.jit
def load_parameter(P, offs_n, mask_n):
    return tl.load(P + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]


@triton.jit
def load_gate(GATE, offs_n, mask_n, VECTOR_GATE: tl.constexpr):
    if VECTOR_GATE:
        gate = load_parameter(GATE, offs_n, mask_n)
    else:
        gate = tl.load(GATE).to(tl.float32)
    return gate
