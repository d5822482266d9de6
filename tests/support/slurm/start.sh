#!/usr/bin/env bash
# Start a real, loopback-only, two-node SLURM test cluster on this one machine.
#
#   bash start.sh            install what is missing, start what is down
#   . "$SLURM_TEST_ROOT/env.sh"    then point a shell at the cluster
#
# Idempotent: daemons that already run are left alone. Everything it writes is
# under SLURM_TEST_ROOT, but for the Debian packages and one marked line in
# /etc/hosts (so that the nodes' names resolve, as on a real cluster).
# With SLURM_TEST_ACCOUNTING=1 (the default) slurmdbd runs too, on a MariaDB of
# its own behind a socket, so that sacct works: submitit learns only from sacct
# that a job died without a result, and waits for ever without it.
# For root on Debian 12 (slurm 22.05). No systemd, no cgroups.
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROOT=${SLURM_TEST_ROOT:-$HERE/state}
NODES=${SLURM_TEST_NODES:-2}          # virtual nodes on this host
CPUS=${SLURM_TEST_CPUS:-2}            # CPUs that each node claims
GPUS=${SLURM_TEST_GPUS:-2}            # pretended GPUs that each node claims
PORT0=${SLURM_TEST_PORT:-17000}       # slurmctld; the nodes follow it
PREFIX=${SLURM_TEST_PREFIX:-node}
ACCOUNTING=${SLURM_TEST_ACCOUNTING:-1}
HOST=$(hostname -s)

say() { echo "slurm: $*" >&2; }
die() { say "$*"; exit 1; }
[ "$(id -u)" = 0 ] || die "must be root"
# Unix sockets are made under it, whose paths may have 107 characters.
[ ${#ROOT} -le 60 ] || die "SLURM_TEST_ROOT is too long (60 characters at most): $ROOT"

# ---- 1. packages ---------------------------------------------------------
PACKAGES=()
command -v munged    >/dev/null || PACKAGES+=(munge)
command -v slurmctld >/dev/null || PACKAGES+=(slurmctld)
command -v slurmd    >/dev/null || PACKAGES+=(slurmd)
command -v sbatch    >/dev/null || PACKAGES+=(slurm-client)
if [ "$ACCOUNTING" = 1 ]; then
    command -v slurmdbd >/dev/null || PACKAGES+=(slurmdbd)
    command -v mariadbd >/dev/null || PACKAGES+=(mariadb-server-core)
fi
if [ ${#PACKAGES[@]} -gt 0 ]; then
    say "installing ${PACKAGES[*]}"
    export DEBIAN_FRONTEND=noninteractive
    # Keep the packages from starting services of their own.
    made_policy=
    if [ ! -e /usr/sbin/policy-rc.d ]; then
        printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
        chmod 755 /usr/sbin/policy-rc.d
        made_policy=1
    fi
    mkdir -p "$ROOT"
    apt_install() {
        apt-get install -y -q --no-install-recommends "${PACKAGES[@]}"
    }
    ok=
    if { apt-get update -q && apt_install; } >"$ROOT/apt.log" 2>&1; then ok=1; fi
    [ -z "$made_policy" ] || rm -f /usr/sbin/policy-rc.d
    [ -n "$ok" ] || { tail -20 "$ROOT/apt.log" >&2; die "apt-get failed"; }
fi

# running NAME: the pid file holds a live process of that program (a zombie,
# which keeps its name where process 1 does not reap, is not one).
running() {
    local pid
    pid=$(cat "$ROOT/run/$1.pid" 2>/dev/null) && [ -n "$pid" ] &&
        grep -qx "Name:[[:space:]]*${1%%.*}" "/proc/$pid/status" 2>/dev/null &&
        ! grep -q '^State:[[:space:]]*Z' "/proc/$pid/status" 2>/dev/null
}
# wait_for SECONDS COMMAND...: until the command succeeds.
wait_for() {
    local end=$((SECONDS + $1)); shift
    until "$@" >/dev/null 2>&1; do
        [ $SECONDS -lt $end ] || return 1
        sleep 0.1
    done
}

# ---- 2. configuration ----------------------------------------------------
umask 022
mkdir -p "$ROOT"/{run,log,ctld}
mkdir -p "$ROOT/munge" "$ROOT/db"
chmod 700 "$ROOT/munge" "$ROOT/db"
last=$NODES
for i in $(seq 1 "$last"); do mkdir -p "$ROOT/spool/$PREFIX$i"; done

[ -s "$ROOT/munge/key" ] || (umask 077; head -c 128 /dev/urandom >"$ROOT/munge/key")

# The nodes' names resolve to loopback, so MASTER_ADDR may be a node's name.
mark="# slurm test nodes"
if ! getent ahostsv4 "$PREFIX$last" >/dev/null; then
    names=$(seq -s ' ' -f "$PREFIX%g" 1 "$last")
    echo "127.0.0.1 $names $mark" >>/etc/hosts
fi
getent ahostsv4 "$HOST" >/dev/null || echo "127.0.0.1 $HOST $mark" >>/etc/hosts

seqs=$([ "$last" = 1 ] && echo 1 || echo "[1-$last]")
ports=$([ "$last" = 1 ] && echo $((PORT0 + 1)) || echo "[$((PORT0 + 1))-$((PORT0 + last))]")

# A cold start forgets the jobs and the nodes' states (slurmctld -c), so its
# jobs' ids must be new ones: by the clock, a job a second at most. Numbering
# from 1 again would let submitit take an older job's result file for its own.
if running slurmctld; then
    first=$(sed -n 's/^FirstJobId=//p' "$ROOT/slurm.conf")
else
    first=$(($(date +%s) % 60000000 + 1))
fi

# Bind to loopback, not to every interface. srun listens on what this host's
# name resolves to, so that may be asked of it only where that is loopback.
bind=NoCtldInAddrAny
case $(getent ahostsv4 "$HOST" | awk 'NR == 1 {print $1}') in
    127.*) bind=NoCtldInAddrAny,NoInAddrAny ;;
esac

gres=; [ "$GPUS" = 0 ] || gres=" Gres=gpu:$GPUS"

accounting="AccountingStorageType=accounting_storage/none"
if [ "$ACCOUNTING" = 1 ]; then
    accounting="AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=localhost
AccountingStoragePort=$((PORT0 + 100))
AccountingStoragePass=$ROOT/run/munge.socket"
    (umask 077; cat >"$ROOT/slurmdbd.conf") <<CONF
DbdHost=localhost
CommunicationParameters=NoInAddrAny
DbdAddr=127.0.0.1
DbdPort=$((PORT0 + 100))
AuthType=auth/munge
AuthInfo=socket=$ROOT/run/munge.socket
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm_acct_db
PidFile=$ROOT/run/slurmdbd.pid
LogFile=$ROOT/log/slurmdbd.log
CommitDelay=0
CONF
fi

cat >"$ROOT/slurm.conf.new" <<CONF
ClusterName=test
FirstJobId=$first
SlurmctldHost=$HOST(127.0.0.1)
SlurmctldPort=$PORT0
SlurmUser=root
SlurmdUser=root
CommunicationParameters=$bind
AuthType=auth/munge
CredType=cred/munge
# cred_expire also is how long a requeued job is held back (120 s unless told).
AuthInfo=socket=$ROOT/run/munge.socket,cred_expire=6

StateSaveLocation=$ROOT/ctld
SlurmctldPidFile=$ROOT/run/slurmctld.pid
SlurmctldLogFile=$ROOT/log/slurmctld.log
SlurmdPidFile=$ROOT/run/slurmd.%n.pid
SlurmdLogFile=$ROOT/log/slurmd.%n.log
SlurmdSpoolDir=$ROOT/spool/%n

# Nothing that needs cgroups.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
$accounting
JobCompType=jobcomp/filetxt
JobCompLoc=$ROOT/log/jobcomp.log
MpiDefault=none
SwitchType=switch/none

SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
# Believe the CPUs and memory below, whatever the host has.
SlurmdParameters=config_overrides
ReturnToService=2

# Preemption as most clusters have it: the partition "high" preempts "low",
# whose jobs are requeued.
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1

# Test clusters should be quick.
KillWait=3
MinJobAge=600
InactiveLimit=0
SlurmctldTimeout=30
SlurmdTimeout=60
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=2
# A preempted job gets the signal that it asked for with --signal (else SIGTERM).
SlurmctldParameters=preempt_send_user_signal

NodeName=$PREFIX$seqs NodeHostname=$HOST NodeAddr=127.0.0.1 Port=$ports CPUs=$CPUS RealMemory=64000$gres State=UNKNOWN
PartitionName=low  Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1  PreemptMode=REQUEUE GraceTime=10
PartitionName=high Nodes=ALL Default=NO  MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
CONF
# Pretended GPUs. They must be character devices (here: /dev/null by other
# names): with plain files the nodes come up, but CUDA_VISIBLE_DEVICES is empty,
# and with a count and no files the nodes are drained.
: >"$ROOT/gres.conf"
if [ "$GPUS" -gt 0 ]; then
    mkdir -p "$ROOT/gpus"
    for i in $(seq 0 $((GPUS - 1))); do
        [ -c "$ROOT/gpus/gpu$i" ] || { rm -f "$ROOT/gpus/gpu$i"; mknod "$ROOT/gpus/gpu$i" c 1 3; }
    done
    printf 'Name=gpu File=%s\n' "$ROOT/gpus/gpu[0-$((GPUS - 1))]" >"$ROOT/gres.conf"
fi

cat >"$ROOT/env.sh" <<ENV
export SLURM_CONF='$ROOT/slurm.conf'
ENV

changed=
cmp -s "$ROOT/slurm.conf.new" "$ROOT/slurm.conf" || changed=1
mv "$ROOT/slurm.conf.new" "$ROOT/slurm.conf"
export SLURM_CONF="$ROOT/slurm.conf"

# ---- 3. daemons ----------------------------------------------------------
if ! running munged; then
    munged --key-file="$ROOT/munge/key" --socket="$ROOT/run/munge.socket" \
        --pid-file="$ROOT/run/munged.pid" --log-file="$ROOT/log/munged.log" \
        --seed-file="$ROOT/munge/seed" --num-threads=2 </dev/null
    say "munged started"
fi
wait_for 10 munge --socket="$ROOT/run/munge.socket" --no-input ||
    die "munged does not answer: see $ROOT/log/munged.log"

if [ "$ACCOUNTING" = 1 ]; then
    if ! running mariadbd; then
        db=(mariadbd --no-defaults --user=root --datadir="$ROOT/db/data"
            --lc-messages-dir=/usr/share/mysql --innodb-buffer-pool-size=64M
            --innodb-log-file-size=8M --skip-networking)
        if [ ! -e "$ROOT/db/ready" ]; then
            rm -rf "$ROOT/db/data"
            mkdir -p "$ROOT/db/data"
            { printf 'create database mysql;\nuse mysql;\n'
              cat /usr/share/mysql/mysql_system_tables{,_data}.sql
            } | "${db[@]}" --bootstrap >"$ROOT/log/bootstrap.log" 2>&1 ||
                die "no database: see $ROOT/log/bootstrap.log"
            touch "$ROOT/db/ready"
        fi
        # No password: its socket is in a folder that only root can enter.
        "${db[@]}" --socket="$ROOT/db/socket" --pid-file="$ROOT/run/mariadbd.pid" \
            --log-error="$ROOT/log/mariadbd.err" --skip-grant-tables \
            --innodb-lock-wait-timeout=900 --innodb-flush-log-at-trx-commit=0 \
            </dev/null >/dev/null 2>&1 &
        disown
        wait_for 20 test -S "$ROOT/db/socket" || die "no database: see $ROOT/log/mariadbd.err"
        say "mariadbd started"
    fi
    if ! running slurmdbd; then
        MYSQL_UNIX_PORT="$ROOT/db/socket" slurmdbd </dev/null
        say "slurmdbd started"
    fi
    wait_for 30 sacctmgr -n show cluster || die "slurmdbd does not answer: see $ROOT/log/slurmdbd.log"
    [ -n "$(sacctmgr -n show cluster test)" ] || sacctmgr -i add cluster test >/dev/null
fi

if ! running slurmctld; then
    slurmctld -c -f "$SLURM_CONF" </dev/null
    say "slurmctld started"
elif [ -n "$changed" ]; then
    scontrol reconfigure
fi
wait_for 15 scontrol ping || die "slurmctld does not answer: see $ROOT/log/slurmctld.log"

for i in $(seq 1 "$last"); do
    if ! running "slurmd.$PREFIX$i"; then
        slurmd -N "$PREFIX$i" -f "$SLURM_CONF" </dev/null
        say "slurmd $PREFIX$i started"
    fi
done

all_up() {
    [ "$(sinfo -h -N -p low -o '%N %T' | grep -cE ' (idle|mixed|allocated|completing)$')" = "$last" ]
}
wait_for 20 all_up || { sinfo -N >&2; die "the nodes are not up: see $ROOT/log"; }
say "ready: $(sinfo -h -p low -o '%N %T %c CPUs %G')"
echo "export SLURM_CONF='$SLURM_CONF'"
