#!/usr/bin/env bash
# Serves a model from the machines of a Ray cluster: run it on one of them, or without a cluster for this machine alone.
#
#   bash scripts/serve_on_ray.sh --replicas 4 --model_path models/XBai-o4
#
# The options are those of `xbai serve-on-ray`; RAY_ADDRESS=host:port names the cluster.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
exec "$venv/bin/xbai" serve-on-ray "$@"
