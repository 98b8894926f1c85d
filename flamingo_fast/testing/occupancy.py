"""How many blocks and warps of a kernel a multiprocessor holds, from what its binary asks for.

Limits: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; allocation
granularities: cuda_occupancy.h of the CUDA toolkit. gfx942: LLVM's AMDGPU subtarget; read compute
unit, wave and LDS for multiprocessor, warp and shared memory.
"""

import dataclasses

KIB = 1024


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A GPU of this architecture (num_sms) and what one of its multiprocessors has (the rest).

    Registers are 32-bit; a warp gets them in multiples of `register_granularity` (over all its
    lanes) from one of four equal parts of the register file. Shared memory is in bytes.
    """

    num_sms: int
    max_warps: int
    max_blocks: int
    shared_per_sm: int
    shared_per_block: int
    warp_size: int = 32
    registers: int = 65536
    register_granularity: int = 256
    shared_granularity: int = 128
    # Taken by the CUDA driver from every block of sm_80 and later.
    shared_reserved: int = KIB


ARCHITECTURES = {
    "sm_80": Architecture(108, 64, 32, 164 * KIB, 163 * KIB),  # A100
    "sm_89": Architecture(128, 48, 24, 100 * KIB, 99 * KIB),  # RTX 4090
    "sm_90": Architecture(132, 64, 32, 228 * KIB, 227 * KIB),  # H100
    "sm_100": Architecture(148, 64, 32, 228 * KIB, 227 * KIB),  # B200
    "sm_120": Architecture(170, 48, 24, 100 * KIB, 99 * KIB),  # RTX 5090
    "gfx942": Architecture(  # MI300X
        304,
        32,
        32,
        64 * KIB,
        64 * KIB,
        warp_size=64,
        registers=131072,
        register_granularity=512,
        shared_granularity=512,
        shared_reserved=0,
    ),
}


@dataclasses.dataclass(frozen=True)
class Occupancy:
    """Resident blocks and warps of a multiprocessor; 0 if not even one block fits."""

    blocks: int
    warps: int


def occupancy(arch: str, registers: int, num_warps: int, shared_bytes: int) -> Occupancy:
    """What a multiprocessor of `arch` holds of a kernel.

    Arguments:
        arch: a key of ARCHITECTURES.
        registers: per thread, at least 1; for gfx942, VGPRs with accumulators.
        num_warps: per block.
        shared_bytes: static and dynamic, per block.
    """
    limits = ARCHITECTURES[arch]
    per_warp = _round_up(registers * limits.warp_size, limits.register_granularity)
    warps_by_registers = 4 * (limits.registers // 4 // per_warp)
    blocks = min(limits.max_blocks, limits.max_warps // num_warps, warps_by_registers // num_warps)
    per_block = _round_up(shared_bytes + limits.shared_reserved, limits.shared_granularity)
    if shared_bytes > limits.shared_per_block:
        blocks = 0
    elif per_block:
        blocks = min(blocks, limits.shared_per_sm // per_block)
    return Occupancy(blocks, blocks * num_warps)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
