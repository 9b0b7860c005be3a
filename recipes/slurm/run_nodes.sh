#!/usr/bin/env bash
# A recipe on several machines without Slurm. Start it on every machine, by hand or with any launcher:
#
#   NODES=3 RANK=0 HEAD_ADDRESS=10.0.0.1 recipes/slurm/run_nodes.sh RECIPE [override …]     # on 10.0.0.1
#   NODES=3 RANK=1 HEAD_ADDRESS=10.0.0.1 recipes/slurm/run_nodes.sh                         # on the second
#   NODES=3 RANK=2 HEAD_ADDRESS=10.0.0.1 recipes/slurm/run_nodes.sh                         # on the third
#
# Rank 0 starts the Ray head, waits for the others, runs the recipe (or COMMAND) and exits with its code; the others end
# with it. SIGTERM or SIGUSR1 to rank 0 saves and ends. Needs the same folder on all machines, or the same copy of it.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
: "${NODES:?how many machines}" "${RANK:?this machine, from 0}" "${HEAD_ADDRESS:?the address of rank 0}"
: "${RAY_PORT:=6379}" "${JOB:=fastkd}"
: "${LOGS:=$PWD/$JOB-logs}"
: "${GPUS_PER_NODE:=$(nvidia-smi -L 2>/dev/null | wc -l)}"
mkdir -p "$LOGS"
[ "$RANK" != 0 ] || rm -f "$LOGS/.ending" "$LOGS/.succeeded" "$LOGS/failed-nodes"
[ -z "${SETUP:-}" ] || eval "$SETUP"
. recipes/slurm/common.sh
set_environment   # all machines must see the same token: that file, or RAY_AUTH_TOKEN
[ "$RANK" != 0 ] || [ -n "${RAY_AUTH_TOKEN:-}" ] || make_token
trap clean_up EXIT
trap 'on_signal TERM' TERM
trap 'on_signal USR1' USR1
trap 'on_signal INT' INT
name=node-$RANK-$(hostname -s)

if [ "$RANK" != 0 ]; then
  until (exec 3<>"/dev/tcp/$HEAD_ADDRESS/$RAY_PORT") 2>/dev/null; do # Ray itself gives up after a minute
    [ "$SECONDS" -lt "$START_SECONDS" ] || { say "no Ray head answers at $HEAD_ADDRESS:$RAY_PORT"; exit 1; }
    [ -z "$stopping" ] || exit 1
    sleep 1
  done
  (ray_on_node "$name") </dev/null >>"$LOGS/worker-$RANK.log" 2>&1 &
  worker_pid=$!
  while kill -0 "$worker_pid" 2>/dev/null; do
    [ -z "$stopping" ] || exit 1
    (exec 3<>"/dev/tcp/$HEAD_ADDRESS/$RAY_PORT") 2>/dev/null || { say "the head is gone"; exit 0; }
    sleep 2 &
    wait $! || true
  done
  wait "$worker_pid" || { say "Ray ended on this machine; see $LOGS/worker-$RANK.log"; exit 1; }
  exit 0
fi

if [ -n "${COMMAND:-}" ]; then
  command=(bash -c "trap : TERM; $COMMAND") # SIGTERM is for what it runs; its code is that of the last command
else
  [ $# -gt 0 ] || { say "name a recipe, or set COMMAND"; exit 2; }
  command=(python -m fastkd.run "$@")
  python -m fastkd.run "$@" --check
fi
(ray_on_node "$name" --head) </dev/null >>"$LOGS/head.log" 2>&1 &
head_pid=$!
wait_for_nodes "$NODES" || { tail -n 3 "$LOGS/status.log" >&2; say "the cluster did not form"; exit 1; }
say "all $NODES nodes joined"
code=0
run_driver "${command[@]}" || code=$?
say "driver ended with code $code${stopping:+ after SIG$stopping}"
exit "$code"
