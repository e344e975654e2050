#!/usr/bin/env bash
# Timeline of the recorded calls:  nsys.sh [--dry-run] REPORT [arguments of run.py]
set -euo pipefail
dry=; if [[ ${1:-} == --dry-run ]]; then dry=echo; shift; fi
report=${1:?REPORT, a path without suffix}; shift
run=(${dry:+printf '%q '})
"${run[@]}" nsys profile --trace=cuda,nvtx --sample=none --cpuctxsw=none --force-overwrite=true \
    --capture-range=cudaProfilerApi --capture-range-end=stop --output="$report" \
    "${PYTHON:-python3}" "$(dirname "$0")/run.py" --mode=region "$@"
${dry:+echo}
"${run[@]}" nsys stats --force-export=true --report=nvtx_kern_sum,cuda_gpu_kern_sum "$report.nsys-rep"
${dry:+echo}
