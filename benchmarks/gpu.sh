#!/usr/bin/env bash
# Every check and benchmark that a GPU can run, in less than nine minutes; JSON under benchmarks/results/gpu/.
#
#     bash benchmarks/gpu.sh
#     bash benchmarks/gpu.sh proof   # instead: SmolLM2's first fine-tuning, ten seeds; it goes on where it stopped
#
# Afterwards `python benchmarks/report_performance.py` puts the steps' times into docs/performance.md.
set -euo pipefail
cd "$(dirname "$0")/.."

if ! python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
    echo "benchmarks/gpu.sh: PyTorch sees no GPU on this machine, so nothing was run." >&2
    exit 1
fi
results=benchmarks/results/gpu
logs=$(mktemp -d)
mkdir -p "$results"
failed=()

# SECONDS NAME COMMAND...: what a command may take; a failure does not keep the others from running
limited() {
    local seconds=$1 name=$2
    shift 2
    echo "== $name"
    timeout "$seconds" "$@" 2>&1 | tee "$logs/$name.log" || failed+=("$name")
}

if [ "${1:-}" = proof ]; then
    proof=$results/first_finetuning.jsonl
    [ -f "$proof" ] || grep '"stage": "tune"' benchmarks/results/first_finetuning.jsonl >"$proof" # the settings chosen
    for setup in domain domain_movie; do
        limited 260 "first_finetuning_$setup" python benchmarks/first_finetuning.py report --setups "$setup" \
            --arms adamw_0.0001 adamw_0.0003 classp_strong rehearsal --seeds 0 1 2 3 4 5 6 7 8 9 \
            --output "$proof"
    done
else
    limited 150 tests python -m pytest -q -p no:cacheprovider tests/test_gpu.py
    for dtype in float32 bfloat16; do
        limited 60 "bench_step_$dtype" python benchmarks/bench_step.py --device cuda --dtype "$dtype" \
            --output "$results/bench_step_$dtype.json"
    done
    limited 75 bench_step_large python benchmarks/bench_step.py --device cuda --weights 200000000 --rounds 10 \
        --output "$results/bench_step_large.json"
    limited 60 bench_penalty python benchmarks/bench_penalty.py --device cuda --output "$results/bench_penalty.json"
    limited 90 bench_fisher python benchmarks/bench_fisher.py --device cuda --output "$results/bench_fisher.json"
    limited 90 bench_sequence python benchmarks/bench_sequence.py --device cuda --output "$results/bench_sequence.json"
fi

if ((${#failed[@]})); then
    echo "benchmarks/gpu.sh: failed or out of time: ${failed[*]} (logs: $logs)" >&2
    exit 1
fi
echo "benchmarks/gpu.sh: done; JSON in $results/"
