#!/usr/bin/env bash
# Ends the cluster of up.sh: the daemons whose ids it wrote down and what runs in their nodes' namespaces, nothing else.
#   tests/slurm/cluster/down.sh [--purge]    --purge removes its folder $LAB too
set -uo pipefail
LAB=${LAB:-${TMPDIR:-/tmp}/coatnet-slurm}
export SLURM_CONF=$LAB/slurm.conf

alive() { # PID NAME: still that program, and no zombie
    [ "$(cat "/proc/$1/comm" 2>/dev/null)" = "$2" ] && ! grep -q '^State:.*Z' "/proc/$1/status" 2>/dev/null
}
stop() { # NAME PIDFILE...: TERM, and KILL after 3 s
    local name=$1 file pids=""
    shift
    for file in "$@"; do
        [ -s "$file" ] && alive "$(cat "$file")" "$name" && pids="$pids $(cat "$file")"
        rm -f "$file"
    done
    for pid in $pids; do kill -TERM "$pid"; done
    for _ in $(seq 30); do
        for pid in $pids; do alive "$pid" "$name" && sleep 0.1 && continue 2; done
        return
    done
    for pid in $pids; do alive "$pid" "$name" && kill -KILL "$pid"; done
}

spaces="" own=$(readlink /proc/self/ns/uts)
for file in "$LAB"/run/slurmd.*.pid; do
    [ -s "$file" ] && alive "$(cat "$file")" slurmd && spaces="$spaces $(readlink "/proc/$(cat "$file")/ns/uts")"
done
stop slurmd "$LAB"/run/slurmd.*.pid
for process in /proc/[0-9]*; do # tasks and step daemons that the nodes leave behind
    space=$(readlink "$process/ns/uts" 2>/dev/null) || continue
    [ -n "$space" ] && [ "$space" != "$own" ] && [[ "$spaces " == *" $space "* ]] && kill -KILL "${process#/proc/}"
done 2>/dev/null
stop slurmctld "$LAB/run/slurmctld.pid"
stop slurmdbd "$LAB/run/slurmdbd.pid"
stop mariadbd "$LAB/run/mariadbd.pid"
stop munged "$LAB/run/munged.pid"
[ -n "${LAB_KEEP_HOSTS:-}" ] || "$(dirname "$0")/hosts.sh" remove # another cluster needs the same names
[ "${1:-}" = --purge ] && rm -rf "$LAB"
echo "down.sh: ended in $SECONDS s" >&2
