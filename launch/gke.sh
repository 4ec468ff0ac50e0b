#!/usr/bin/env bash
# A training run on GKE, on TPUs or GPUs, as an XPK workload.
#
#     bash launch/gke.sh [--dry-run] NAME CONFIG DATA WORKDIR [OVERRIDES...]
#     CLUSTER=c PROJECT=p ZONE=us-east5-b TYPE=v6e-16 IMAGE=REGISTRY/palign bash launch/gke.sh dpo configs/dpo.py \
#         gs://BUCKET/pairs.jsonl gs://BUCKET/runs/dpo
#
# CONFIG is a path inside the image (launch/Dockerfile); DATA and WORKDIR lie in a bucket, since all hosts read and write
# them. With --dry-run XPK prints what it would do and NAME.yaml, the JobSet, is written; no cluster is asked.
#
# Environment:
#     CLUSTER, PROJECT, ZONE  of the cluster
#     TYPE                    of the devices, as XPK names them: v6e-16, tpu7x-16, h100-mega-80gb-8
#     IMAGE                   the container
#     SLICES                  TPU slices, or GPU nodes; 1
#     XPK                     the command; xpk ("uvx xpk" keeps its dependencies apart)
set -euo pipefail

dry=()
if [[ ${1:-} == --dry-run ]]; then
  dry=(--dry-run --skip-validation)
  shift
fi
if (($# < 4)); then
  echo "usage: bash launch/gke.sh [--dry-run] NAME CONFIG DATA WORKDIR [OVERRIDES...]" >&2
  exit 2
fi
name=$1 config=$2 data=$3 workdir=$4
shift 4
if [[ ! $name =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]]; then
  echo "launch/gke.sh: NAME $name: expected at most 40 small letters, digits and hyphens" >&2
  exit 2
fi
for variable in CLUSTER PROJECT ZONE TYPE IMAGE; do
  if [[ -z ${!variable:-} ]]; then
    echo "launch/gke.sh: $variable must be set; the head of this file says to what" >&2
    exit 2
  fi
done

# The command is text that a shell in the container reads; exec, so that SIGTERM reaches Python itself.
printf -v command '%q ' exec python -m palign.cli.train "--config=$config" "--config.data.path=$data" \
  "--workdir=$workdir" "$@"
case $TYPE in
  h100* | h200* | b200* | gb200* | a100*) devices=("--device-type=$TYPE" "--num-nodes=${SLICES:-1}") ;;
  *) devices=("--tpu-type=$TYPE" "--num-slices=${SLICES:-1}") ;;
esac
if ((${#dry[@]})); then dry+=("--output-manifest-file=$name.yaml"); fi

read -ra xpk <<<"${XPK:-xpk}"
# 75: told to stop, and saved; two minutes are for the saving.
exec "${xpk[@]}" workload create "--workload=$name" "--cluster=$CLUSTER" "--project=$PROJECT" "--zone=$ZONE" \
  "${devices[@]}" "--docker-image=$IMAGE" --max-restarts=20 --restart-on-exit-codes=75 \
  --termination-grace-period-seconds=120 "--command=$command" ${dry[@]+"${dry[@]}"}
