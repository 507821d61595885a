#!/usr/bin/env bash
# Sourced by the others: `device` (cpu or cuda: $DEVICE, else what is here) and `venv`, the environment for it ($XBAI_VENV,
# else .venv). vLLM's builds for the two cannot share one, so that on a machine with GPUs the CPU's is .venv-cpu.
set -euo pipefail

device=cpu
[[ $(nvidia-smi -L 2>/dev/null) == GPU* ]] && device=cuda
venv=.venv
[[ ${DEVICE:-$device} == "$device" ]] || venv=.venv-$DEVICE
device=${DEVICE:-$device} venv=${XBAI_VENV:-$venv}
if [[ $device == cpu ]]; then export CUDA_VISIBLE_DEVICES=; fi
