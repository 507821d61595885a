#!/usr/bin/env bash
# Start a Ray cluster: the head on this machine, and over ssh one worker on each other host.
#
#   bash run_worker_n.sh host1 host2 ...      hosts as arguments
#   bash run_worker_n.sh -f hosts.txt         or one a line (# begins a comment); HOSTS_FILE=hosts.txt does the same
#
# Needs ssh without a password, and this repository and its environment at the same path on every host. HEAD_ADDRESS
# says by which address the hosts reach this machine (its first one), PORT on which port (6379).
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
hosts_file=${HOSTS_FILE:-}
if [[ ${1:-} == -f ]]; then
    hosts_file=${2:?"-f needs a file with one host a line"}
    shift 2
fi
hosts=("$@")
if [[ -n $hosts_file ]]; then
    [[ -r $hosts_file ]] || { echo "error: $hosts_file: no such file of hosts" >&2; exit 2; }
    mapfile -t -O "${#hosts[@]}" hosts < <(sed -e 's/#.*//' -e 's/[[:space:]]//g' -e '/^$/d' "$hosts_file")
fi
if ((${#hosts[@]} == 0)); then
    echo "error: no hosts; usage: bash run_worker_n.sh host1 host2 ... | -f hosts.txt" >&2
    exit 2
fi

port=${PORT:-6379}
address=${HEAD_ADDRESS:-$(hostname -I | awk '{print $1}')}
bin=$(dirname "$(command -v ray)")
PORT=$port bash "$here/run_head.sh" --node-ip-address="$address"
token=$(ray get-auth-token)

failed=()
for host in "${hosts[@]}"; do
    echo "$host joins $address:$port"
    # The token goes through the pipe: command lines can be read by every user of a host.
    ssh -o BatchMode=yes "$host" "read -r RAY_AUTH_TOKEN; export RAY_AUTH_TOKEN PATH=$(printf %q "$bin"):\$PATH; \
        bash $(printf %q "$here/run_worker.sh") $address:$port" <<<"$token" || failed+=("$host")
done
if ((${#failed[@]})); then
    echo "error: could not start a worker on ${failed[*]}; the others have joined, 'ray stop' on each ends them" >&2
    exit 1
fi
echo "$((${#hosts[@]} + 1)) nodes are up; next: NNODES=$((${#hosts[@]} + 1)) bash scripts/run_multi_node.sh"
