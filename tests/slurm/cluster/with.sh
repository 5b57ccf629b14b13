#!/usr/bin/env bash
# Starts the cluster of up.sh, runs a command on it, and ends it whatever became of the command.
#   tests/slurm/cluster/with.sh [--install] COMMAND...
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
export LAB=${LAB:-${TMPDIR:-/tmp}/coatnet-slurm}
exec 9>"$LAB.lock"
flock 9 # names and ports are those of the machine: one cluster at a time
trap '"$here/down.sh" --purge' EXIT
install=""
[ "$1" = --install ] && install=$1 && shift
"$here/up.sh" $install 9>&-
export SLURM_CONF=$LAB/slurm.conf
"$@" 9>&-
