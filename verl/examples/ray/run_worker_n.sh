#!/usr/bin/env bash
# Start a Ray cluster: the head on this machine, and over ssh one worker on each other host.
#
#   bash run_worker_n.sh host1 host2 ...      hosts as arguments
#   bash run_worker_n.sh -f hosts.txt         or one a line (# begins a comment); HOSTS_FILE=hosts.txt does the same
#
# Needs ssh without a password, and this repository and its environment at the same path on every host. HEAD_ADDRESS
# says by which address the hosts reach this machine (the one from which it reaches the first of them), PORT on which
# port (6379).
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

# Of several networks, the one on which the host lies; its name may be one that only ssh knows.
address_towards() {
    local host
    host=$(getent ahostsv4 "$1" | awk 'NR == 1 {print $1}') || true
    if [[ -n $host ]] && command -v ip >/dev/null; then
        ip -o route get "$host" | sed -n 's/.* src \([0-9.]*\).*/\1/p'
    else
        hostname -I | awk '{print $1}'
    fi
}

# Before anything starts: a head without workers would be left running.
reach() { ssh -o BatchMode=yes -o ConnectTimeout=10 "$@"; }
command -v ssh >/dev/null || { echo "error: ssh is needed to start workers on ${hosts[*]}, and is not installed" >&2; exit 2; }
command -v ray >/dev/null || export PATH=$here/../../../.venv/bin:$PATH
command -v ray >/dev/null || { echo "error: ray is not installed; run: bash scripts/setup.sh" >&2; exit 2; }
unfit=()
for host in "${hosts[@]}"; do
    reach "$host" "test -r $(printf %q "$here/run_worker.sh")" </dev/null 2>/dev/null || unfit+=("$host")
done
if ((${#unfit[@]})); then
    echo "error: nothing was started: ${unfit[*]} cannot be reached by ssh without a password, or lacks $here" >&2
    exit 2
fi

port=${PORT:-6379}
address=${HEAD_ADDRESS:-$(address_towards "${hosts[0]#*@}")}
bin=$(cd "$(dirname "$(command -v ray)")" && pwd)
PORT=$port bash "$here/run_head.sh" --node-ip-address="$address"
token=$(ray get-auth-token)

failed=()
for host in "${hosts[@]}"; do
    echo "$host joins $address:$port"
    # The token goes through the pipe: command lines can be read by every user of a host.
    reach "$host" "read -r RAY_AUTH_TOKEN; export RAY_AUTH_TOKEN PATH=$(printf %q "$bin"):\$PATH; \
        bash $(printf %q "$here/run_worker.sh") $address:$port" <<<"$token" || failed+=("$host")
done
if ((${#failed[@]})); then
    echo "error: no worker started on ${failed[*]}; the head and the others run on, 'ray stop' on each ends them" >&2
    exit 1
fi
echo "$((${#hosts[@]} + 1)) nodes are up; next: NNODES=$((${#hosts[@]} + 1)) bash scripts/run_multi_node.sh"
