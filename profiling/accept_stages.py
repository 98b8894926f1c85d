"""The stages of `flamingo-fast accept`, the cheapest and most decisive first."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Stage:
    """
    Attributes:
        target: "module:function", called with an `accept_context.Context` in a process of its own.
        limit_s: after so many seconds it is ended, and has failed.
        most_processes: that share its cases on a GPU: compiling kernels is work of the CPU.
    """

    name: str
    about: str
    target: str
    limit_s: float
    most_processes: int = 1


LONGEST_S = 9 * 60
ALL_S = 25 * 60

_HERE = "flamingo_fast.profiling.accept"

STAGES = (
    Stage("doctor", "versions, devices, backends", f"{_HERE}_tools:doctor", 40),
    Stage("parity", "kernels against an fp64 oracle", f"{_HERE}_parity:parity", 270, 8),
    Stage("sanitizer", "compute-sanitizer on small cases", f"{_HERE}_tools:sanitizer", 150),
    Stage("graphs", "CUDA graphs of ops, decoding, training", f"{_HERE}_graphs:graphs", 100),
    Stage("backends", "other libraries' kernels", f"{_HERE}_parity:backends", 60),
    Stage("launch", "CPU time of a call over its launches", f"{_HERE}_launch:launch", 90),
    Stage("tuning", "launch configurations of this device", f"{_HERE}_bench:tuning", 150),
    Stage("bench", "ops, modules, decoding, % of ceilings", f"{_HERE}_bench:bench", 240),
    Stage("table3", "table 3 at the largest scale that fits", f"{_HERE}_bench:table3", 190),
    Stage("sessions", "nsys and ncu sessions of three targets", f"{_HERE}_tools:sessions", 150),
)
