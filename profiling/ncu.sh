#!/usr/bin/env bash
# Counters and source lines of each recorded kernel:  ncu.sh [--dry-run] REPORT [arguments of run.py]
# RANGE=interval_attention_bwd keeps the kernels of that range (needs the nvtx package).
set -euo pipefail
dry=; if [[ ${1:-} == --dry-run ]]; then dry=echo; shift; fi
report=${1:?REPORT, a path without suffix}; shift
# Clocks stay as in real use: locked to base, as by default, times are not those of a benchmark.
${dry:+printf '%q '} ncu --set full --import-source yes --clock-control none \
    --profile-from-start off --nvtx ${RANGE:+--nvtx-include "vidgen@$RANGE/"} \
    --target-processes all --force-overwrite --export "$report" \
    "${PYTHON:-python3}" "$(dirname "$0")/run.py" --mode=region "$@"
${dry:+echo}
