"""What a compiled kernel asks of the GPU, read from its machine code.

NVIDIA: SASS and resource usage, by the cuobjdump and nvdisasm that come with Triton. AMD: the
assembly text that Triton keeps.
"""

import dataclasses
import functools
import re
import subprocess
import tempfile
from typing import Any

# What ptxas counts as static shared memory of every kernel from sm_90 on: the CUDA driver's own.
_RESERVED_SHARED_BYTES = 1024

_SASS_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
_SASS_WIDTH = re.compile(r"\.[US]?(8|16|64|128|256)(?=\.|$)")
_SASS_LOADS = {"LDG", "LDGSTS", "UTMALDG"}
_SASS_STORES = {"STG", "UTMASTG"}

_GCN_INSTRUCTION = re.compile(r"^\s+([a-z]\w*)", re.MULTILINE)
_GCN_ACCESS = re.compile(
    r"(?:global|buffer|flat)_(load|store)_(?:lds_)?[us]?(byte|short|dword)(?:x([234]))?"
)
_GCN_WIDTHS = {"byte": 8, "short": 16, "dword": 32}


@dataclasses.dataclass(frozen=True)
class Binary:
    """Numbers of one compiled kernel.

    registers: per thread; gfx942: VGPRs, accumulators included.
    local_bytes: stack per thread, where spilled registers go.
    spills: instructions that load from or store to it; gfx942: spilled VGPRs.
    shared_bytes: static and dynamic, per block, without the driver's own.
    tensor_memory: columns of it per block (sm_100); Triton compiles a trap where there are too few.
    matrix_instructions: HMMA, HGMMA, UTCHMMA, ... or MFMA, in the program text.
    wgmma: those of a warp group (HGMMA).
    load_bits, store_bits: widest global access of a thread, asynchronous copies included; a bulk
        (TMA) copy counts as 128, its unit. 0: none.
    tf32: a matrix instruction rounds its inputs to TF32 (gfx942: XF32).
    instructions: in the program text.
    """

    num_warps: int
    registers: int
    local_bytes: int
    spills: int
    shared_bytes: int
    tensor_memory: int
    matrix_instructions: int
    wgmma: int
    load_bits: int
    store_bits: int
    tf32: bool
    instructions: int


@functools.cache
def nvidia_tools() -> tuple[str, str]:
    """Paths of cuobjdump and nvdisasm.

    Raises:
        FileNotFoundError: this Triton came without them.
    """
    from triton import knobs

    # A path's getter starts the tool to ask for its version, hence the cache.
    try:
        return knobs.nvidia.cuobjdump.path, knobs.nvidia.nvdisasm.path
    except RuntimeError as error:
        raise FileNotFoundError(
            "cuobjdump and nvdisasm, which Triton's wheels hold in triton/backends/nvidia/bin, are "
            "missing; set TRITON_CUOBJDUMP_PATH and TRITON_NVDISASM_PATH to those of a CUDA toolkit"
        ) from error


def read_binary(compiled: Any) -> Binary:
    """The numbers of a triton.compiler.CompiledKernel, which need not be loaded on a device."""
    if "cubin" in compiled.asm:
        usage, sass = _disassemble(compiled.asm["cubin"])
        binary = read_nvidia(
            usage, sass, compiled.asm["ptx"], compiled.metadata.num_warps, compiled.metadata.shared
        )
        columns = getattr(compiled.metadata, "tmem_size", None) or 0
        return dataclasses.replace(binary, tensor_memory=columns)
    return read_amd(compiled.asm["amdgcn"], compiled.metadata.num_warps, compiled.metadata.shared)


def _disassemble(cubin: bytes) -> tuple[str, str]:
    cuobjdump, nvdisasm = nvidia_tools()
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        commands = ([cuobjdump, "--dump-resource-usage"], [nvdisasm, "--print-code"])
        usage, sass = (
            subprocess.run([*command, file.name], capture_output=True, text=True, check=True).stdout
            for command in commands
        )
    return usage, sass


def read_nvidia(usage: str, sass: str, ptx: str, num_warps: int, dynamic_shared: int) -> Binary:
    """From `cuobjdump --dump-resource-usage`, `nvdisasm --print-code` and PTX."""
    resources = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    if resources is None:
        raise ValueError(f"cuobjdump printed no resource usage: {usage!r}")
    registers, stack, static_shared, local = map(int, resources.groups())
    opcodes = [opcode for opcode in _SASS_INSTRUCTION.findall(sass) if opcode != "NOP"]
    bases = [opcode.partition(".")[0] for opcode in opcodes]
    return Binary(
        num_warps=num_warps,
        registers=registers,
        local_bytes=stack + local,
        spills=sum(base in ("LDL", "STL") for base in bases),
        shared_bytes=dynamic_shared + max(static_shared - _RESERVED_SHARED_BYTES, 0),
        tensor_memory=0,
        # Not the whole opcode: HFMA2.MMA moves a constant.
        matrix_instructions=sum(base.endswith("MMA") for base in bases),
        wgmma=bases.count("HGMMA"),
        load_bits=_widest(opcodes, _SASS_LOADS),
        store_bits=_widest(opcodes, _SASS_STORES),
        # A dot or after a colon, not a bare "tf32": a kernel's name may hold that.
        tf32=bool(re.search(r"[.:]tf32\b", ptx)) or any(".TF32" in opcode for opcode in opcodes),
        instructions=len(opcodes),
    )


def _widest(opcodes: list[str], bases: set[str]) -> int:
    return max((_sass_width(op) for op in opcodes if op.partition(".")[0] in bases), default=0)


def _sass_width(opcode: str) -> int:
    if opcode.startswith("U"):
        return 128
    widths = [int(width) for width in _SASS_WIDTH.findall(opcode)]
    return max(widths, default=32)


def read_amd(assembly: str, num_warps: int, dynamic_shared: int) -> Binary:
    """From AMDGPU assembly with its metadata."""
    opcodes = _GCN_INSTRUCTION.findall(assembly.partition(".amdhsa_kernel")[0])
    opcodes = [opcode for opcode in opcodes if opcode != "s_nop"]
    accesses: dict[str, int] = {"load": 0, "store": 0}
    for opcode in opcodes:
        if access := _GCN_ACCESS.match(opcode):
            kind, unit, count = access.groups()
            accesses[kind] = max(accesses[kind], _GCN_WIDTHS[unit] * int(count or 1))
    matrix = [opcode for opcode in opcodes if re.match(r"v_s?mfma", opcode)]
    return Binary(
        num_warps=num_warps,
        registers=_amd_metadata(assembly, "vgpr_count"),
        local_bytes=_amd_metadata(assembly, "private_segment_fixed_size"),
        spills=_amd_metadata(assembly, "vgpr_spill_count"),
        shared_bytes=dynamic_shared,
        tensor_memory=0,
        matrix_instructions=len(matrix),
        wgmma=0,
        load_bits=accesses["load"],
        store_bits=accesses["store"],
        tf32=any("xf32" in opcode for opcode in matrix),
        instructions=len(opcodes),
    )


def _amd_metadata(assembly: str, key: str) -> int:
    found = re.search(rf"\.{key}:\s+(\d+)", assembly)
    if found is None:
        raise ValueError(f"the assembly's metadata has no .{key}")
    return int(found.group(1))
