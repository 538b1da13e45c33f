#!/usr/bin/env bash
# On a GPU machine, from a checkout with llava_engine/_kernels.so in it (python setup.py build_csrc):
# the GPU tests, the benches and compute-sanitizer. Results go to a folder, a JSON file each.
#
#     bench/gpu.sh [FOLDER]     PYTHON and COMMIT may be set, and PARTS to some of those below; "load",
#                               "cold" and "serving" write 14 GB first, and are not among the usual ones
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-${OUT:-bench/results}}
python=${PYTHON:-python3}
parts=${PARTS:-smoke tests bench step decode vision matmul preprocess fp8 sanitize}
mkdir -p "$out"
export COMMIT=${COMMIT:-$(git rev-parse HEAD 2>/dev/null || echo unknown)}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
failed=0
# Without one the benches measure the CPU, which is no result of this machine's.
$python -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "torch sees no GPU")' || exit 1

for part in $parts; do
  started=$SECONDS
  case $part in
    smoke)  # every kernel once; nothing else is worth starting where this fails
      # Before 13 Pillow resampled tall pictures in another order, and the package asks for 13.
      $python -c 'import sys, PIL; v = PIL.__version__; int(v.split(".")[0]) >= 13 or sys.exit(
        f"Pillow {v} is too old, 13 is needed: {sys.executable} -m pip install .whl/pillow-*.whl")' || exit 1
      $python bench/sanitize.py || exit 1
      ;;
    tests)
      # A process a file, side by side, and alone those that look at all of the card's memory.
      # Warnings of another torch than the pinned one are not this run's business.
      mkdir -p "$out/gpu_tests"
      alone="test_loading test_pool"
      together=$(cd tests/gpu && ls test_*.py | sed 's/\.py$//' | grep -vxF "${alone// /$'\n'}")
      run_tests() {
        xargs -P "$1" -I{} sh -c '"$0" -m pytest -m gpu "tests/gpu/$1.py" -q --maxfail=25 -W default \
          -p no:cacheprovider --durations=3 --durations-min=1 -o junit_family=xunit1 --junitxml="$2/gpu_tests/$1.xml" \
          > "$2/gpu_tests/$1.log" 2>&1' "$python" {} "$out"
      }
      tr ' ' '\n' <<< "$together" | run_tests 6 || failed=1
      tr ' ' '\n' <<< "$alone" | run_tests 1 || failed=1
      cat "$out"/gpu_tests/*.log > "$out/gpu_tests.log"
      grep -aE '^(FAILED|ERROR|E  )|^[0-9.]+s (call|setup)|passed|failed|error' "$out/gpu_tests.log" | cut -c1-220 | tail -85
      $python - "$out" <<'EOF'
import json, os, sys
from pathlib import Path
import xml.etree.ElementTree as tree
import torch
reports = sorted(Path(sys.argv[1], "gpu_tests").glob("*.xml"))
suites = [tree.parse(report).getroot()[0] for report in reports]
cases = [(c.get("classname") + "::" + c.get("name"), c) for s in suites for c in s.iter("testcase")]
record = {
    "commit": os.environ["COMMIT"], "device": torch.cuda.get_device_name(), "torch": torch.__version__,
    "files": [report.stem for report in reports],
    **{k: sum(int(s.get(k)) for s in suites) for k in ("tests", "failures", "errors", "skipped")},
    "seconds": {r.stem: float(s.get("time")) for r, s in zip(reports, suites)},
    "properties": {n: {p.get("name"): p.get("value") for p in c.iter("property")}
                   for n, c in cases if c.find("properties") is not None},
    "failed": [n for n, c in cases if c.find("failure") is not None or c.find("error") is not None],
}
print({k: record[k] for k in ("tests", "failures", "errors", "skipped")})
Path(sys.argv[1], "gpu_tests.json").write_text(json.dumps(record, indent=1) + "\n")
EOF
      rm -r "$out/gpu_tests"
      ;;
    bench)
      $python bench/kernels.py --json "$out/kernels.json" || failed=1
      ;;
    step)
      $python bench/decode_step.py --json "$out/decode_step.json" || failed=1
      ;;
    vision)
      $python bench/vision.py --json "$out/vision.json" || failed=1
      ;;
    matmul)
      $python bench/matmul.py --json "$out/matmul.json" || failed=1
      ;;
    preprocess)
      $python bench/preprocess.py --json "$out/preprocess.json" || failed=1
      ;;
    prefill)  # a graph per bucket against one call
      $python bench/prefill_graph.py --json "$out/prefill_graph.json" || failed=1
      ;;
    quant)  # weights in 8 and 4 bits; int8 and nf4 need bitsandbytes
      $python bench/quant_linear.py --json "$out/quant_linear.json" || failed=1
      for format in int8 fp8 nf4; do
        $python bench/decode_step.py --quantization $format --rows 1 2 4 8 16 64 \
          --json "$out/decode_step_$format.json" || failed=1
        $python bench/decode.py --quantization $format --json "$out/decode_$format.json" || failed=1
      done
      ;;
    fp8)  # what prefill in fp8 costs in accuracy
      $python bench/fp8.py --scenes 0 --json "$out/fp8.json" || failed=1
      ;;
    load)  # writes a checkpoint of 14 GB to a temporary folder first
      $python bench/load.py 14 --json "$out/load.json" || failed=1
      ;;
    cold)  # so does this; then seven processes start from it
      $python bench/cold_start.py --json "$out/cold_start.json" || failed=1
      ;;
    serving)  # 14 GB of random weights in memory first; about 130 s, 50 of them torch.compile's
      room=$(df --output=avail -k /dev/shm 2>/dev/null | tail -1)
      checkpoints=/tmp; [ "${room:-0}" -gt 16000000 ] && checkpoints=/dev/shm
      TMPDIR=${CHECKPOINTS:-$checkpoints} $python bench/serving.py --model llava-1.5-7b \
        --random-weights --device cuda --dtype float16 --kv-cache-mb 15000 --prompt-tokens 26 \
        --new-tokens 128 --concurrency 1,8,64 --peers "${PEERS:-vllm,eager,compiled}" \
        --json "$out/serving.json" --report "$out/serving.html" --ops bench/results/kernels.json ||
        failed=1
      ;;
    soak)  # under two minutes; a kernel is poisoned at the end, in a process of its own
      $python -m bench.soak --device cuda --minutes 1.2 --cancelled 3000 --json "$out/soak_gpu.json" ||
        failed=1
      ;;
    decode)
      $python bench/decode.py --json "$out/decode.json" || failed=1
      ;;
    sanitize)
      compute-sanitizer --tool memcheck $python bench/sanitize.py > "$out/memcheck.log" 2>&1 ||
        failed=1
      compute-sanitizer --tool racecheck $python bench/sanitize.py attention sampling linear matmul \
        step \
        > "$out/racecheck.log" 2>&1 || failed=1
      grep -ahE 'SUMMARY|^ran|Error|error' "$out/memcheck.log" "$out/racecheck.log" | sort | uniq -c |
        head -20
      ;;
  esac
  echo "== $part: $((SECONDS - started)) s"
done
exit $failed
