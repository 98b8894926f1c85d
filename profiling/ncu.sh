#!/bin/sh
# Nsight Compute around a target of `flamingo-fast profile run`, for people who prefer scripts:
#
#   profiling/ncu.sh OUT TARGET [options of flamingo_fast.profiling.session]
#
# The same command line as `flamingo-fast profile run TARGET --tool ncu --out OUT`; ncu takes what
# else it is to do from $NCU_ARGS, such as --kernel-name regex:one_medium. Clocks are locked to base:
# times are longer than outside, and can be compared. Where that is not allowed, or real clocks are
# wanted: NCU_ARGS='--clock-control none'.
set -eu
[ $# -ge 2 ] || { echo "usage: $0 OUT TARGET [--steps N] [--warmup N] [--device D]" >&2; exit 2; }
out=$1
shift
mkdir -p "$out"
PYTHONPATH=$(cd "$(dirname "$0")/.." && pwd)${PYTHONPATH:+:$PYTHONPATH}
export PYTHONPATH
exec "${FLAMINGO_FAST_NCU:-ncu}" --nvtx --nvtx-include flamingo_fast@capture --set full \
  --import-source yes --clock-control base --target-processes all --force-overwrite \
  --export "$out/report" ${NCU_ARGS:-} \
  "${PYTHON:-python3}" -m flamingo_fast.profiling.session --steps 1 "$@" --tool ncu --out "$out"
