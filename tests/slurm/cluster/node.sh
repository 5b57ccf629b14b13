#!/usr/bin/env bash
# Breaks and mends nodes of the cluster of up.sh.
#   node.sh kill n2       the power is cut: slurmd, step daemons and tasks of the node die at once
#   node.sh freeze n2     it hangs: all of them stop;  node.sh thaw n2 lets them go on
#   node.sh pids n2       process id and name of what runs there
#   node.sh restore n2    its slurmd is started again where it is down, and the node resumed
#   node.sh hurry         jobs that were queued again may start now: SLURM holds them back for two minutes
set -uo pipefail
LAB=${LAB:-${TMPDIR:-/tmp}/coatnet-slurm}
export SLURM_CONF=$LAB/slurm.conf

pids() { # NODE: what shares the namespace of its slurmd
    local space process
    space=$(readlink "/proc/$(cat "$LAB/run/slurmd.$1.pid")/ns/uts" 2>/dev/null) || return 0 # it is down
    [ "$space" != "$(readlink /proc/self/ns/uts)" ] || return 0
    for process in /proc/[0-9]*; do
        if [ "$(readlink "$process/ns/uts" 2>/dev/null)" = "$space" ]; then echo "${process#/proc/}"; fi
    done
}
case "${1:-}" in
kill) pids "$2" | xargs kill -KILL 2>/dev/null || true ;;  # some end while others are being killed
freeze) pids "$2" | xargs kill -STOP ;;
thaw) pids "$2" | xargs kill -CONT ;;
pids) pids "$2" | while read -r pid; do echo "$pid $(cat "/proc/$pid/comm" 2>/dev/null)"; done ;;
restore)
    [ -n "$(pids "$2")" ] || unshare --uts bash -c "hostname $2; exec slurmd -N $2"
    scontrol update nodename="$2" state=resume 2>/dev/null || true # refused where there is nothing to resume from
    ;;
hurry)
    squeue -h -r -t PD -o "%i %r" | while read -r job reason; do
        if [ "$reason" = BeginTime ]; then scontrol update JobId="$job" StartTime=now || true; fi
    done
    ;;
*)
    sed -n '2,8p' "$0"
    exit 2
    ;;
esac
