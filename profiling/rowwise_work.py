"""Work of one launch of the row-wise kernels: gated residuals, norms, squared ReLU, partial sums.

Operations are those of `bench.work`, shared out among the kernels of a backward.
"""

import dataclasses

from flamingo_fast.bench.work import Work
from flamingo_fast.profiling.launches import Call


@dataclasses.dataclass(frozen=True)
class LaunchWork:
    """What one launch does.

    Attributes:
        useful: each byte that it has to move, once, its partial sums included; operations of
            valid numbers.
        executed: bytes as lanes ask for them, those that caches serve included; operations of
            whole tiles.
    """

    useful: Work
    executed: Work


def _with_more_loads(useful: Work, more: int) -> LaunchWork:
    """`more`: bytes that are loaded again."""
    return LaunchWork(useful, useful + Work(more, 0, 0))


def squared_relu_fwd(call: Call) -> LaunchWork:
    return _with_more_loads(Work(call.num_bytes("X"), call.num_bytes("OUT"), 2 * call["numel"]), 0)


def squared_relu_bwd(call: Call) -> LaunchWork:
    moved = Work(call.num_bytes("X", "DOUT"), call.num_bytes("DX"), 3 * call["numel"])
    return _with_more_loads(moved, 0)


def _gate_of_programs(call: Call) -> int:
    """Bytes of the gate that all programs load, of its tile of columns or of the only number."""
    size = call["GATE"].element_size()
    if not call["VECTOR_GATE"]:
        return size * call.programs
    col_blocks = -(-call["width"] // call["BLOCK_N"])
    return size * call["width"] * (call.programs // col_blocks)


def gated_residual_fwd(call: Call) -> LaunchWork:
    numel, once = call["numel"], call.num_bytes("GATE")
    useful = Work(call.num_bytes("X", "Y") + once, call.num_bytes("OUT"), 2 * numel)
    return _with_more_loads(useful, _gate_of_programs(call) - once)


def gated_residual_bwd(call: Call) -> LaunchWork:
    numel, useful, again = call["numel"], Work(call.num_bytes("DOUT"), 0, 0), 0
    if call["NEED_DY"]:
        once = call.num_bytes("GATE")
        useful += Work(once, call.num_bytes("DY"), numel)
        again = _gate_of_programs(call) - once
    if call["NEED_DGATE"]:
        useful += Work(call.num_bytes("Y"), call.num_bytes("PARTIALS", "SCALARS"), 2 * numel)
    return _with_more_loads(useful, again)


def _parameters_again(call: Call, once: int) -> int:
    """Beyond the first time: each program loads parameters, or for each of its blocks of rows."""
    blocks = -(-call["rows"] // call["BLOCK_M"])
    return once * ((call.programs if call["KEEP_PARAMETERS"] else blocks) - 1)


def _scalar_gate_again(call: Call) -> int:
    return int(call["GATE"].element_size()) * (call.programs - 1)


def norm_fwd(call: Call) -> LaunchWork:
    numel = call["rows"] * call["width"]
    vectors = [name for name in ("WEIGHT", "BIAS") if call[f"HAS_{name}"]]
    useful = Work(call.num_bytes("X"), call.num_bytes("NORMED", "RSTD", "MEAN"), 0)
    useful += Work(0, 0, (4 if call["RMS"] else 7) * numel)
    again = 0
    if call["GATED"]:
        useful += Work(call.num_bytes("Y"), call.num_bytes("RESIDUAL"), 2 * numel)
        if call["VECTOR_GATE"]:
            vectors.append("GATE")
        else:
            useful += Work(call.num_bytes("GATE"), 0, 0)
            again = _scalar_gate_again(call)
    parameters = call.num_bytes(*vectors)
    useful += Work(parameters, 0, 0)
    return _with_more_loads(useful, again + _parameters_again(call, parameters))


def norm_bwd(call: Call) -> LaunchWork:
    numel = call["rows"] * call["width"]
    sums = call.num_bytes("PARTIALS", "SCALARS")
    useful = Work(call.num_bytes("X", "DNORMED", "RSTD", "MEAN"), sums, 0)
    has_gate_sum = call["SCALAR_GATE"] or call["VECTOR_GATE_SLOT"] >= 0
    needs_dx = call["NEED_DX"] or call["NEED_DY"] or has_gate_sum
    flops = 2 * (call["WEIGHT_SLOT"] >= 0) + (call["BIAS_SLOT"] >= 0)
    vectors, again = [], 0
    if needs_dx:
        flops += 7 if call["RMS"] else 10
        vectors += ["WEIGHT"] if call["HAS_WEIGHT"] else []
    if needs_dx and call["HAS_DRESIDUAL"]:
        flops += 1
        useful += Work(call.num_bytes("DRESIDUAL"), 0, 0)
    if call["NEED_DX"]:
        useful += Work(0, call.num_bytes("DX"), 0)
    if call["NEED_DY"]:
        flops += 1
        useful += Work(0, call.num_bytes("DY"), 0)
        if call["VECTOR_GATE"]:
            vectors.append("GATE")
        else:
            useful += Work(call.num_bytes("GATE"), 0, 0)
            again = _scalar_gate_again(call)
    if has_gate_sum:
        flops += 2
        useful += Work(call.num_bytes("Y"), 0, 0)
    parameters = call.num_bytes(*vectors)
    useful += Work(parameters, 0, flops * numel)
    return _with_more_loads(useful, again + _parameters_again(call, parameters))


def norm_bwd_columns(call: Call) -> LaunchWork:
    """Statistics are loaded again for every block of columns."""
    numel = call["rows"] * call["width"]
    useful, again = Work(0, call.num_bytes("PARTIALS"), 0), 0
    if call["WEIGHT_SLOT"] >= 0 or call["BIAS_SLOT"] >= 0:
        flops = 2 * (call["WEIGHT_SLOT"] >= 0) + (call["BIAS_SLOT"] >= 0)
        useful += Work(call.num_bytes("DNORMED"), 0, flops * numel)
    if call["WEIGHT_SLOT"] >= 0:
        statistics = call.num_bytes("MEAN", "RSTD")
        useful += Work(call.num_bytes("X") + statistics, 0, 0)
        again = statistics * (-(-call["width"] // call["BLOCK_N"]) - 1)
    if call["VECTOR_GATE_SLOT"] >= 0:
        useful += Work(call.num_bytes("DX", "Y"), 0, 2 * numel)
    return _with_more_loads(useful, again)


def sum_partials(call: Call) -> LaunchWork:
    useful = Work(call.num_bytes("PARTIALS"), 0, call["PARTIALS"].numel())
    for name in ("WEIGHT", "BIAS", "VECTOR_GATE"):
        if call[f"{name}_SLOT"] >= 0:
            gradient = "DGATE" if name == "VECTOR_GATE" else f"D{name}"
            useful += Work(0, call.num_bytes(gradient), 0)
    if call["VECTOR_GATE_SLOT"] >= 0 or call["SCALAR_GATE"]:
        useful += Work(call.num_bytes("GATE"), 0, 0)
    if call["SCALAR_GATE"]:
        useful += Work(call.num_bytes("SCALARS"), call.num_bytes("DGATE"), call["num_scalars"])
    return _with_more_loads(useful, 0)
