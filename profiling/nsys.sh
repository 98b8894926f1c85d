#!/bin/sh
# Nsight Systems around a target of `flamingo-fast profile run`, for people who prefer scripts:
#
#   profiling/nsys.sh OUT TARGET [options of flamingo_fast.profiling.session]
#
# The same command line as `flamingo-fast profile run TARGET --tool nsys --out OUT` on a GPU; nsys
# takes what it is to trace from $NSYS_TRACE, and what else it is to do from $NSYS_ARGS.
set -eu
[ $# -ge 2 ] || { echo "usage: $0 OUT TARGET [--steps N] [--warmup N] [--device D]" >&2; exit 2; }
out=$1
shift
mkdir -p "$out"
PYTHONPATH=$(cd "$(dirname "$0")/.." && pwd)${PYTHONPATH:+:$PYTHONPATH}
# Ranges that aren't registered strings may begin the capture, too.
NSYS_NVTX_PROFILER_REGISTER_ONLY=0
export PYTHONPATH NSYS_NVTX_PROFILER_REGISTER_ONLY
exec "${FLAMINGO_FAST_NSYS:-nsys}" profile --trace="${NSYS_TRACE:-cuda,nvtx,osrt,cudnn,cublas}" \
  --sample=none --cpuctxsw=none --capture-range=nvtx --nvtx-capture=capture@flamingo_fast \
  --capture-range-end=stop --force-overwrite=true --output="$out/report" ${NSYS_ARGS:-} \
  "${PYTHON:-python3}" -m flamingo_fast.profiling.session "$@" --tool nsys --out "$out"
