#!/usr/bin/env bash
# Starts a private SLURM cluster of several nodes on this one machine: munge, slurmctld, one slurmd per node, and for
# accounting slurmdbd with MariaDB. Debian's packages; needs root.
#
#   tests/slurm/cluster/up.sh [--install]    then: export SLURM_CONF=$LAB/slurm.conf
#   tests/slurm/cluster/down.sh              ends all of it
#
# Everything lies in $LAB (keys, sockets, configuration, spools, database): nothing of the machine's own SLURM, munge or
# MySQL is read or written. Outside it one thing changes: a marked block of the hosts file, so that the nodes' names
# resolve; down.sh takes it out. A second call starts what is missing.
#
# Knobs: LAB (/tmp/coatnet-slurm), LAB_NODES (4), LAB_DATABASE (1; 0 is a cluster without accounting),
# LAB_PORT (16817, +1, +2 and +101.. are used)
set -euo pipefail

LAB=${LAB:-${TMPDIR:-/tmp}/coatnet-slurm}
NODES=${LAB_NODES:-4}
DATABASE=${LAB_DATABASE:-1}
PORT=${LAB_PORT:-16817}
CPUS=32 # of a node; nothing is pinned
GPUS=8  # of a node; device files without a device
export SLURM_CONF=$LAB/slurm.conf

fail() {
    echo "up.sh: $*" >&2
    exit 1
}
[ "$(id -u)" = 0 ] || fail "needs root: slurmd in namespaces, the hosts file, device files"

packages="munge slurmctld slurmd slurm-client"
[ "$DATABASE" = 1 ] && packages="$packages slurmdbd slurm-wlm-mysql-plugin mariadb-server"
programs="munged slurmctld slurmd sbatch"
[ "$DATABASE" = 1 ] && programs="$programs slurmdbd mariadbd"
missing() { for program in $programs; do command -v "$program" >/dev/null || echo "$program"; done; }
if [ "${1:-}" = --install ] && [ -n "$(missing)" ]; then
    apt-get update -qq >&2
    # shellcheck disable=SC2086
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $packages >&2
fi
[ -z "$(missing)" ] || fail "missing: $(missing | tr '\n' ' '); run it with --install, or apt-get install $packages"

mkdir -p "$LAB"/{run,log,state,spool,munge,gpu}
chmod 755 "$LAB" "$LAB"/{run,log,state,spool,gpu}
chmod 700 "$LAB/munge"
folder=$LAB
while [ "$folder" != / ]; do
    [ $((0$(stat -c %a "$folder") & 1)) = 1 ] || fail "$folder cannot be entered by MariaDB's user: choose another LAB"
    folder=$(dirname "$folder")
done

alive() { # PIDFILE NAME: still that program, and no zombie that init has yet to reap
    [ -s "$1" ] && [ "$(cat "/proc/$(cat "$1")/comm" 2>/dev/null)" = "$2" ] &&
        ! grep -q '^State:.*Z' "/proc/$(cat "$1")/status"
}
until_it() { # WHAT COMMAND...: wait for up to 30 s
    local what=$1
    shift
    for _ in $(seq 150); do
        "$@" >/dev/null 2>&1 && return 0
        sleep 0.2
    done
    tail -n 20 "$LAB"/log/*.log >&2 || true
    fail "$what did not come up; logs in $LAB/log"
}

# ------------------------------------------------------------------------------------------------------ configuration
"$(dirname "$0")/hosts.sh" add "$NODES"
# A GPU is a device file to SLURM: copies of /dev/null give real scheduling and CUDA_VISIBLE_DEVICES.
for ((g = 0; g < GPUS; g++)); do [ -c "$LAB/gpu/fake$g" ] || mknod -m 666 "$LAB/gpu/fake$g" c 1 3; done
{
    cat <<CONF
ClusterName=lab
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=$PORT
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$LAB/run/munge.sock
StateSaveLocation=$LAB/state
SlurmdSpoolDir=$LAB/spool/%n
SlurmctldPidFile=$LAB/run/slurmctld.pid
SlurmdPidFile=$LAB/run/slurmd.%n.pid
SlurmctldLogFile=$LAB/log/slurmctld.log
SlurmdLogFile=$LAB/log/slurmd.%n.log
# what a container can offer: no cgroups, no task affinity
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
MailProg=/bin/true
ReturnToService=1
SlurmdParameters=config_overrides
# clocks: a lost node is noticed in seconds where a cluster takes minutes
SlurmdTimeout=10
SlurmctldTimeout=10
KillWait=5
UnkillableStepTimeout=60
BatchStartTimeout=10
MessageTimeout=10
OverTimeLimit=0
InactiveLimit=0
MinJobAge=300
CompleteWait=0
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=5,batch_sched_delay=0,sched_min_interval=0
PriorityType=priority/basic
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobRequeue=1
JobFileAppend=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
CONF
    if [ "$DATABASE" = 1 ]; then
        cat <<CONF
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$((PORT + 1))
AccountingStoragePass=$LAB/run/munge.sock
AccountingStorageTRES=gres/gpu
CONF
    else
        echo AccountingStorageType=accounting_storage/none
    fi
    for ((i = 1; i <= NODES; i++)); do
        echo "NodeName=n$i NodeHostname=n$i NodeAddr=127.0.10.$i Port=$((PORT + 100 + i)) CPUs=$CPUS" \
            "CoresPerSocket=$CPUS RealMemory=1000000 Gres=gpu:$GPUS State=UNKNOWN"
    done
    common="Nodes=n[1-$NODES] MaxTime=INFINITE DefaultTime=10 State=UP OverSubscribe=NO"
    echo "PartitionName=main $common Default=YES PriorityTier=10 PreemptMode=REQUEUE"
    echo "PartitionName=low $common PriorityTier=1 PreemptMode=REQUEUE GraceTime=10"
    echo "PartitionName=lowcancel $common PriorityTier=1 PreemptMode=CANCEL GraceTime=10"
} >"$SLURM_CONF.new"
mv "$SLURM_CONF.new" "$SLURM_CONF"
echo "Name=gpu File=$LAB/gpu/fake[0-$((GPUS - 1))]" >"$LAB/gres.conf"
echo "CgroupAutomount=no" >"$LAB/cgroup.conf"

# ------------------------------------------------------------------------------------------------------------- munge
if ! alive "$LAB/run/munged.pid" munged; then
    [ -s "$LAB/munge/key" ] || head -c 1024 /dev/urandom >"$LAB/munge/key"
    chmod 400 "$LAB/munge/key"
    rm -f "$LAB"/run/munge.sock*
    munged --force --key-file="$LAB/munge/key" --socket="$LAB/run/munge.sock" --pid-file="$LAB/run/munged.pid" \
        --log-file="$LAB/log/munged.log" --seed-file="$LAB/munge/seed" 2>>"$LAB/log/munged.log"
    until_it munged munge -n -S "$LAB/run/munge.sock"
fi

# -------------------------------------------------------------------------------------------------------- accounting
database() { mariadb --no-defaults --socket="$LAB/run/db/mysql.sock" "$@"; }
if [ "$DATABASE" = 1 ]; then
    if ! alive "$LAB/run/mariadbd.pid" mariadbd; then
        if [ ! -d "$LAB/db/mysql" ]; then
            install -d -o mysql -g mysql "$LAB/db"
            mariadb-install-db --no-defaults --user=mysql --datadir="$LAB/db" --skip-test-db \
                --auth-root-authentication-method=socket >"$LAB/log/mariadb-install.log" 2>&1
        fi
        install -d -o mysql -g mysql "$LAB/run/db"
        setsid mariadbd --no-defaults --user=mysql --datadir="$LAB/db" --socket="$LAB/run/db/mysql.sock" \
            --pid-file="$LAB/run/db/pid" --bind-address=127.0.0.1 --port=$((PORT + 2)) \
            --innodb-buffer-pool-size=64M --innodb-log-file-size=16M --innodb-flush-log-at-trx-commit=0 \
            --innodb-lock-wait-timeout=900 --skip-log-bin </dev/null >"$LAB/log/mariadb.log" 2>&1 &
        echo $! >"$LAB/run/mariadbd.pid"
        disown
        until_it mariadbd database -e "SELECT 1"
        for from in 127.0.0.1 localhost; do
            database -e "CREATE DATABASE IF NOT EXISTS slurm_acct_db;
                CREATE USER IF NOT EXISTS slurm@'$from' IDENTIFIED BY 'lab';
                GRANT ALL ON slurm_acct_db.* TO slurm@'$from';"
        done
    fi
    cat >"$LAB/slurmdbd.conf" <<CONF
AuthType=auth/munge
AuthInfo=socket=$LAB/run/munge.sock
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort=$((PORT + 1))
SlurmUser=root
LogFile=$LAB/log/slurmdbd.log
PidFile=$LAB/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=$((PORT + 2))
StorageUser=slurm
StoragePass=lab
StorageLoc=slurm_acct_db
CONF
    chmod 600 "$LAB/slurmdbd.conf"
    if ! alive "$LAB/run/slurmdbd.pid" slurmdbd; then
        slurmdbd
        until_it slurmdbd sacctmgr -n show cluster
        [ -n "$(sacctmgr -nP show cluster lab format=cluster)" ] || sacctmgr -iQ add cluster lab >/dev/null || true
    fi
fi

# ----------------------------------------------------------------------------------------------- controller and nodes
if ! alive "$LAB/run/slurmctld.pid" slurmctld; then
    slurmctld
    until_it slurmctld scontrol ping
fi
for ((i = 1; i <= NODES; i++)); do
    alive "$LAB/run/slurmd.n$i.pid" slurmd && continue
    mkdir -p "$LAB/spool/n$i"
    # A namespace of its own for the host's name: jobs see n1, n2, ..., and node.sh knows what belongs to the node.
    unshare --uts bash -c "hostname n$i; exec slurmd -N n$i"
done
up() {
    for ((i = 1; i <= NODES; i++)); do scontrol update nodename="n$i" state=resume || true; done
    [ "$(sinfo -h -N -p main -t idle,alloc,mix,comp -o %N | sort -u | wc -l)" = "$NODES" ]
}
until_it "not every node" up
echo "up.sh: $NODES nodes in $SECONDS s; export SLURM_CONF=$SLURM_CONF" >&2
