#!/usr/bin/env bash
# One model over several GPUs of this machine, by hand: TP shards, each on a GPU of its own, and a router.
#
#   deploy/launch_tp.sh MODEL TP [flags of `loraplex router`...]
#
# When a part ends, everything ends, with that part's exit code. SIGTERM and SIGINT let running requests finish;
# a second one ends everything at once. (`loraplex serve --tp` does the same, and restarts shards that die.)
# The parts talk over loopback, without TLS.
#
#   DEVICE=cpu                 instead of cuda
#   CUDA_VISIBLE_DEVICES=4,5   which GPUs; 0 to TP-1 unless set
#   PORT=9100                  the ranks meet at this port, shard N listens at PORT+1+N; free ones unless set
#   SHARD_FLAGS='...'          for every shard, split at spaces, such as --dtype bfloat16 --max-num-seqs 64
#   PYTHON=...                 one that has loraplex; that of .venv where there is one, else python3
set -euo pipefail

say() {
    echo "launch_tp: $*" >&2
}

if [ $# -lt 2 ]; then
    say "usage: launch_tp.sh MODEL TP [flags of loraplex router...]"
    exit 2
fi
model=$1
tp=$2
shift 2
venv=$(dirname "$0")/../.venv/bin/python
if [ -x "$venv" ]; then default=$venv; else default=python3; fi
python=${PYTHON:-$default}
device=${DEVICE:-cuda}
patience=10 # seconds between SIGTERM and SIGKILL
parts=()
router=
signals=0

# start NAME COMMAND...: $! is then its process id, and that of its group. Its standard input is a pipe that only
# this script holds open: a part watches it, and ends with the script however that ends.
start() {
    local name=$1 log
    shift
    exec {log}> >(trap '' INT TERM && exec sed -u "s/^/[$name] /" >&2 9>&-)
    LORAPLEX_LIFELINE=1 PYTHONUNBUFFERED=1 setsid "$@" </proc/$$/fd/9 >&"$log" 2>&1 9>&- {log}>&- &
    exec {log}>&-
    parts+=($!)
}

runs() {
    kill -0 "$1" 2>/dev/null
}

# wait_for_end: returns when one of the parts has ended. $ended is its process id, $code its exit code.
wait_for_end() {
    while :; do
        for ended in "${parts[@]}"; do
            if ! runs "$ended"; then
                code=0
                wait "$ended" || code=$?
                return
            fi
        done
        sleep 0.2 || true # a signal to the group ends it early
    done
}

on_signal() {
    signals=$((signals + 1))
    if [ "$signals" -eq 1 ] && [ -n "$router" ]; then
        kill -TERM "$router" 2>/dev/null || true
    else
        kill_groups
    fi
}

kill_groups() {
    local part
    for part in "${parts[@]}"; do
        kill -KILL -- "-$part" 2>/dev/null || true
    done
}

clean_up() {
    trap '' INT TERM
    local part deadline=$((SECONDS + patience))
    for part in "${parts[@]}"; do
        kill -TERM "$part" 2>/dev/null || true
    done
    for part in "${parts[@]}"; do
        while runs "$part" && [ "$SECONDS" -lt "$deadline" ]; do
            sleep 0.1
        done
    done
    kill_groups
}

choose_ports() {
    if [ -n "${PORT:-}" ]; then
        seq "$PORT" $((PORT + tp))
    else
        "$python" -c "
import socket
held = [socket.create_server(('127.0.0.1', 0)) for _ in range($tp + 1)]
print(*(each.getsockname()[1] for each in held), sep='\n')"
    fi
}

chosen=$(choose_ports)
mapfile -t ports <<<"$chosen"
IFS=, read -ra gpus <<<"${CUDA_VISIBLE_DEVICES:-$(seq -s , 0 $((tp - 1)))}"
read -ra shard_flags <<<"${SHARD_FLAGS:-}"
if [ "$device" = cpu ]; then
    cores=$(nproc)
    shard_flags=(--threads $((cores > tp ? cores / tp : 1)) "${shard_flags[@]}")
elif [ "${#gpus[@]}" -lt "$tp" ]; then
    say "CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES names fewer than $tp GPUs"
    exit 2
fi

exec 9<> <(:)
trap clean_up EXIT
trap on_signal INT TERM

addresses=()
for ((rank = 0; rank < tp; rank++)); do
    if [ "$device" != cpu ]; then
        export CUDA_VISIBLE_DEVICES=${gpus[rank]}
    fi
    start "shard $rank" "$python" -P -m loraplex shard "$model" --device "$device" --port "${ports[rank + 1]}" \
        --rank "$rank" --world-size "$tp" --master "127.0.0.1:${ports[0]}" "${shard_flags[@]}"
    addresses+=("127.0.0.1:${ports[rank + 1]}")
done

start "launch_tp" "$python" -P -c '
import asyncio, sys
from loraplex import lifeline
from loraplex.probes import until_shard_ready
lifeline.watch()
for address in sys.argv[1:]:
    asyncio.run(until_shard_ready(address))' "${addresses[@]}"
probe=$!
wait_for_end
if [ "$signals" -gt 0 ]; then
    exit 0
elif [ "$ended" != "$probe" ] || [ "$code" -ne 0 ]; then
    say "a shard ended before all were ready (exit code $code)"
    exit "$((code ? code : 1))"
fi
unset 'parts[-1]'
say "all shards are ready"

start router "$python" -P -m loraplex router --served-model-name "$model" "--group=$(IFS=,; echo "${addresses[*]}")" "$@"
router=$!
wait_for_end
if [ "$signals" -eq 0 ]; then
    if [ "$ended" = "$router" ]; then part="the router"; else part="a shard"; fi
    say "$part ended (exit code $code)"
    exit "$((code ? code : 1))" # nobody had asked it to end
fi
exit "$code"
