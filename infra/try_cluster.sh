#!/usr/bin/env bash
# Starts a two-node Ray cluster with token authentication on this machine, runs a command that knows of it, and ends it.
#   infra/try_cluster.sh mergequest submit my.yaml --address http://127.0.0.1:8265
set -euo pipefail
[ $# -gt 0 ] || { sed -n 2,3p "$0"; exit 2; }

export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
RAY_AUTH_TOKEN=$(python3 -c "import secrets; print(secrets.token_hex(32))")
export RAY_AUTH_TOKEN
log=$(mktemp -d)
nodes=()
finish() { for node in "${nodes[@]}"; do kill "$node" 2>/dev/null || true; done; wait; }
trap finish EXIT INT TERM

ray start --head --block --node-ip-address=127.0.0.1 --port=6399 --dashboard-host=127.0.0.1 --dashboard-port=8265 \
  --num-cpus="${CPUS_PER_NODE:-1}" >"$log/head" 2>&1 &
nodes+=($!)
until curl -fs -o /dev/null -H "Authorization: Bearer $RAY_AUTH_TOKEN" http://127.0.0.1:8265/api/version; do sleep 1; done
# one after another: two nodes that start at the same instant can collide on a port
ray start --block --address=127.0.0.1:6399 --num-cpus="${CPUS_PER_NODE:-1}" >"$log/worker" 2>&1 &
nodes+=($!)
sleep 5
"$@"
