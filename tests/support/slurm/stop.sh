#!/usr/bin/env bash
# Stop the test cluster that start.sh started: only the processes whose
# ids are in its pid files, and only if they still are what the file says.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROOT=${SLURM_TEST_ROOT:-$HERE/state}
say() { echo "slurm: $*" >&2; }
export SLURM_CONF="$ROOT/slurm.conf"

# is NAME PID: that process is alive and is that program (no zombie, which keeps
# its name where process 1 does not reap).
is() {
    grep -qx "Name:[[:space:]]*$1" "/proc/$2/status" 2>/dev/null &&
        ! grep -q '^State:[[:space:]]*Z' "/proc/$2/status" 2>/dev/null
}

stop() { # NAME, then the program is NAME up to the first dot
    local file="$ROOT/run/$1.pid" prog=${1%%.*} pid
    pid=$(cat "$file" 2>/dev/null) || return 0
    if [ -n "$pid" ] && is "$prog" "$pid"; then
        kill -TERM "$pid"
        for _ in $(seq 100); do is "$prog" "$pid" || break; sleep 0.1; done
        if is "$prog" "$pid"; then say "$1 ($pid) killed"; kill -KILL "$pid"; fi
        say "$1 ($pid) stopped"
    fi
    rm -f "$file"
}

# The jobs first, so that no job's process outlives its cluster.
if timeout 5 scontrol ping >/dev/null 2>&1; then
    ids=$(timeout 5 squeue -h -o %A | sort -un || true)
    if [ -n "$ids" ]; then
        # shellcheck disable=SC2086
        timeout 10 scancel $ids || true
        for _ in $(seq 100); do
            [ -n "$(timeout 5 squeue -h -o %A || true)" ] || break
            sleep 0.1
        done
    fi
fi
for file in "$ROOT"/run/slurmd.*.pid; do
    [ -e "$file" ] || continue
    name=${file##*/}; stop "${name%.pid}"
done
stop slurmctld
stop slurmdbd
stop mariadbd
stop munged
