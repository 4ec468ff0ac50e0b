#!/usr/bin/env bash
# A training run on a TPU slice that gcloud makes: v4, v5e, v5p and v6e.
#
# Google keeps this interface in maintenance mode: TPU7x and later are had through GKE (launch/gke.sh) or Compute Engine
# only, and nothing here replaces a slice that is taken away. SkyPilot (launch/sky/tpu_pod.yaml) does.
#
#     bash launch/tpu_vm.sh [--dry-run] create NAME
#     bash launch/tpu_vm.sh [--dry-run] train NAME CONFIG DATA WORKDIR [OVERRIDES...]
#     bash launch/tpu_vm.sh [--dry-run] delete NAME
#
# `create` asks for the slice and returns; `gcloud compute tpus queued-resources describe NAME` says when it is there.
# `train` copies the checkout's last commit to all hosts, installs it and runs it; the same command again goes on.
# --dry-run prints the commands.
#
# Environment:
#     PROJECT, ZONE  of the slice
#     TYPE           as gcloud names it; v6e-16
#     VERSION        of the hosts' system; v2-alpha-tpuv6e
set -euo pipefail

usage() {
  sed -n '7,9s/^#     /  /p' "${BASH_SOURCE[0]}" >&2
  exit 2
}
run() {
  if [[ -n $dry ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

dry=''
if [[ ${1:-} == --dry-run ]]; then
  dry=1
  shift
fi
if (($# < 2)); then usage; fi
action=$1 name=$2
shift 2
if [[ ! $name =~ ^[a-z]([a-z0-9-]{0,61}[a-z0-9])?$ ]]; then
  echo "launch/tpu_vm.sh: NAME $name: expected at most 63 small letters, digits and hyphens" >&2
  exit 2
fi
for variable in PROJECT ZONE; do
  if [[ -z ${!variable:-} ]]; then
    echo "launch/tpu_vm.sh: $variable must be set" >&2
    exit 2
  fi
done
place=("--project=$PROJECT" "--zone=$ZONE")

case $action in
  create)
    run gcloud compute tpus queued-resources create "$name" "--node-id=$name" "${place[@]}" \
      "--accelerator-type=${TYPE:-v6e-16}" "--runtime-version=${VERSION:-v2-alpha-tpuv6e}" --spot
    ;;
  delete)
    run gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force --quiet
    ;;
  train)
    if (($# < 3)); then usage; fi
    config=$1 data=$2 workdir=$3
    shift 3
    archive=$(mktemp -t palign-XXXXXX.tar)
    trap 'rm -f "$archive"' EXIT
    git -C "$(dirname "${BASH_SOURCE[0]}")/.." archive --output="$archive" HEAD
    printf -v train '%q ' .venv/bin/python -m palign.cli.train "--config=$config" "--config.data.path=$data" \
      "--workdir=$workdir" "$@"
    install="mkdir -p palign && tar -xf palign.tar -C palign && cd palign && python3 -m pip install --user --quiet uv \
&& python3 -m uv venv --allow-existing --python 3.12 .venv \
&& python3 -m uv pip install --python .venv/bin/python -e '.[train,tpu,gcs]'"
    run gcloud compute tpus tpu-vm scp "$archive" "$name:palign.tar" --worker=all "${place[@]}"
    run gcloud compute tpus tpu-vm ssh "$name" --worker=all "${place[@]}" "--command=$install && $train"
    ;;
  *) usage ;;
esac
