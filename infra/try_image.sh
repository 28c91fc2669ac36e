#!/usr/bin/env bash
# Builds the image, starts a head without work and a worker from it, each in a container with the rights and the command line that
# infra/kuberay gives them, runs a command in a third, and ends them. With docker or podman:
#   infra/try_image.sh mergequest submit my.yaml --out "$PWD/runs/mine"
# The containers see the directory that this is called in, and no other, under its own path: their user (1000) must be able to read
# what the command reads there, and to write what it writes. They cannot be reached from outside, and reach nothing.
# Settings: ENGINE (docker), IMAGE (mergequest:try), CPUS of the worker (2), and BUILD_OPTIONS and RUN_OPTIONS of the engine.
set -euo pipefail
[ $# -gt 0 ] || { sed -n 2,7p "$0"; exit 2; }

read -ra engine <<<"${ENGINE:-docker}"
read -ra build <<<"${BUILD_OPTIONS:-}"
read -ra run <<<"${RUN_OPTIONS:-}"
image=${IMAGE:-mergequest:try} name=mergequest-$$
root=$(cd "$(dirname "$0")/.." && pwd)
"${engine[@]}" build "${build[@]}" --file "$root/infra/Dockerfile" --tag "$image" "$root"

finish() {
  result=$?
  [ $result = 0 ] || for node in head worker; do "${engine[@]}" logs --tail 40 "$name-$node" || true; done >&2
  # one by one: podman removes none where one is missing
  for part in command worker head; do "${engine[@]}" rm --force --volumes "$name-$part" >/dev/null 2>&1 || true; done
  "${engine[@]}" network rm "$name" >/dev/null
}
"${engine[@]}" network create --internal "$name" >/dev/null
trap finish EXIT
trap 'exit 130' INT TERM

RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export RAY_AUTH_TOKEN
container() { # its part, then the image's command
  local part=$1
  shift
  "${engine[@]}" run --name "$name-$part" --network "$name" --cap-drop ALL --security-opt no-new-privileges --shm-size 1g \
    --env RAY_AUTH_TOKEN --env RAY_API_SERVER_ADDRESS="http://$name-head:8265" --volume "$PWD:$PWD" --workdir "$PWD" \
    "${run[@]}" "$@"
}
options="--block --object-store-memory=268435456 --dashboard-agent-listen-port=52365 --metrics-export-port=8080"
container head --detach "$image" bash -c "ray start --head --num-cpus=0 --dashboard-host=0.0.0.0 $options" >/dev/null
container worker --detach "$image" bash -c "until ray health-check --address $name-head:6379; do sleep 1; done
  ray start --address=$name-head:6379 --num-cpus=${CPUS:-2} $options" >/dev/null
# as the operator does: not before both are ready
for node in head worker; do
  "${engine[@]}" exec "$name-$node" timeout 120 bash -c "until wget -qO- http://localhost:52365/api/healthz; do sleep 1; done" >/dev/null
done
container command --rm "$image" "$@"
