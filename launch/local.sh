#!/usr/bin/env bash
# One training run on this machine, started again when something kills it.
#
#     bash launch/local.sh CONFIG WORKDIR [OVERRIDES...]
#     bash launch/local.sh configs/dpo.py runs/dpo --config.data.path=pairs.jsonl
#
# CONFIG, WORKDIR and OVERRIDES are those of `python -m palign.cli.train`. A process that a signal killed (out of memory,
# say) or that was told to stop (75) is started again with the same command and goes on from its last checkpoint. Every
# other end is final, and its exit code is this script's (docs/training.md has the table). SIGTERM and Ctrl-C to this
# script are passed on to the run and end it.
#
# Environment:
#     PYTHON           the interpreter; .venv/bin/python of the checkout, else python3
#     PALIGN_RESTARTS  how often a run is started again; 5
set -euo pipefail

if (($# < 2)); then
  echo "usage: bash launch/local.sh CONFIG WORKDIR [OVERRIDES...]" >&2
  exit 2
fi
config=$1 workdir=$2
shift 2

checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-}
if [[ -z $python ]]; then
  python=python3
  if [[ -x $checkout/.venv/bin/python ]]; then python=$checkout/.venv/bin/python; fi
fi
restarts=${PALIGN_RESTARTS:-5}
export PYTHONPATH=$checkout${PYTHONPATH:+:$PYTHONPATH}

child='' stop='' interrupted=''
pass_on() { # a signal to this script goes to the run, and no other run is begun
  stop=$1 interrupted=1
  if [[ -n $child ]]; then kill -s "$1" "$child" 2>/dev/null || true; fi
}
trap 'pass_on TERM' TERM
trap 'pass_on INT' INT

set -m # the run is a process group of its own, so that Ctrl-C reaches it once, through pass_on
for ((run = 0; ; run++)); do
  "$python" -m palign.cli.train --config="$config" --workdir="$workdir" "$@" &
  child=$!
  while :; do
    code=0 interrupted=''
    wait "$child" || code=$?
    if [[ -z $interrupted ]]; then break; fi # a signal ends the waiting, not the run
  done
  child=''
  if ((code != 75 && code <= 128 || code == 130)) || [[ -n $stop ]]; then exit "$code"; fi
  if ((run == restarts)); then
    echo "launch/local.sh: ended with code $code, started again $restarts times; giving up" >&2
    exit "$code"
  fi
  echo "launch/local.sh: ended with code $code; starting again ($((run + 1)) of $restarts)" >&2
  sleep 1
done
