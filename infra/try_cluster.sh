#!/usr/bin/env bash
# Starts a two-node Ray cluster with token authentication and an S3 server (moto) with a bucket on this machine, runs a command
# that knows of them, and ends them. From an environment with mergequest's `dev` extra:
#   infra/try_cluster.sh mergequest submit my.yaml --out s3://mergequest/runs/mine
#   infra/try_cluster.sh bash    # and look around: mergequest status s3://mergequest/runs/mine
# Dashboard and S3 listen on loopback only; Ray's nodes, if there is to be more than one, on every interface, and ask for the token.
# Settings: CPUS_PER_NODE (1), and the ports GCS_PORT (and three after it), DASHBOARD_PORT, METRICS_PORT, S3_PORT, below 10000.
set -euo pipefail
[ $# -gt 0 ] || { sed -n 2,7p "$0"; exit 2; }

cpus=${CPUS_PER_NODE:-1} gcs=${GCS_PORT:-6399} dashboard=${DASHBOARD_PORT:-8265} metrics=${METRICS_PORT:-8080} s3=${S3_PORT:-9100}
log=$(mktemp -d)
started=()
finish() {
  for process in "${started[@]}"; do kill "$process" 2>/dev/null || true; done
  wait
  echo "logs: $log" >&2
}
trap finish EXIT
trap 'exit 130' INT TERM

until_it_works() { # what, command: tried for two minutes
  for _ in $(seq 240); do
    "${@:2}" >/dev/null 2>&1 && return
    sleep 0.5
  done
  echo "$1 did not start: see $log" >&2
  exit 1
}

export AWS_ENDPOINT_URL=http://127.0.0.1:$s3 AWS_ACCESS_KEY_ID=try AWS_SECRET_ACCESS_KEY=try AWS_REGION=us-east-1
export AWS_EC2_METADATA_DISABLED=true
moto_server -H 127.0.0.1 -p "$s3" >"$log/s3" 2>&1 &
started+=($!)
until_it_works "the S3 server" curl -fs "$AWS_ENDPOINT_URL"
curl -fs -o /dev/null -X PUT "$AWS_ENDPOINT_URL/mergequest"

export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
RAY_AUTH_TOKEN=$(python -c "import secrets; print(secrets.token_hex(32))")
export RAY_AUTH_TOKEN
options=(--block --node-ip-address=127.0.0.1 --num-cpus="$cpus")
ray start --head "${options[@]}" --port="$gcs" --dashboard-host=127.0.0.1 --dashboard-port="$dashboard" \
  --ray-client-server-port=$((gcs + 1)) --dashboard-agent-listen-port=$((gcs + 2)) \
  --metrics-export-port="$metrics" >"$log/head" 2>&1 &
started+=($!)
export RAY_API_SERVER_ADDRESS=http://127.0.0.1:$dashboard
until_it_works "the head" curl -fs -H "Authorization: Bearer $RAY_AUTH_TOKEN" "$RAY_API_SERVER_ADDRESS/api/version"
# one after another: two nodes that start at the same instant can collide on a port
ray start "${options[@]}" --address=127.0.0.1:"$gcs" --dashboard-agent-listen-port=$((gcs + 3)) >"$log/worker" 2>&1 &
started+=($!)
until_it_works "the second node" bash -c "curl -fs -H 'Authorization: Bearer $RAY_AUTH_TOKEN' $RAY_API_SERVER_ADDRESS/api/v0/nodes | grep -o ALIVE | wc -l | grep -qx 2"
"$@"
