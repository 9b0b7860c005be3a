# What run.sbatch and run_nodes.sh share: the environment, Ray on a node, the driver and its signals. Source it.
#
# Everything below can be set before submitting; docs/runbook.md has the table.

: "${LOGS:=$PWD/${JOB:=local}-logs}"       # driver.log, head.log, worker-*.log, status.log, job.log
: "${GPUS_PER_NODE:=0}"                    # 0 = a CPU cluster of WORKERS_PER_NODE workers
: "${WORKERS_PER_NODE:=1}"
: "${NETWORK_INTERFACE:=}"                 # such as ib0; empty = the one that leads to the head
: "${START_SECONDS:=600}"                  # for all nodes to join
: "${SAVE_SECONDS:=240}"                   # for the driver to save and end after a walltime signal
: "${STATUS_SECONDS:=60}"                  # between two entries of status.log
: "${OFFLINE:=1}"                          # compute nodes rarely reach the internet
: "${RAY_FOLDER:=${TMPDIR:-/tmp}/ray-$JOB}"  # with the node's name added: sockets, Ray's logs; a short path
: "${CACHES:=${TMPDIR:-/tmp}/fastkd-${USER:-user}}" # on a local disk: compiled kernels of torch, Triton and vLLM

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

driver_pid="" head_pid="" worker_pid="" status_pid="" killer_pid="" waiting_pid="" stopping=""

say() { printf '%(%F %T)T %s\n' -1 "$*" | tee -a "$LOGS/job.log" >&2; }

# What every process of a job sees.
set_environment() {
  if [ "$OFFLINE" = 1 ]; then
    export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 WANDB_MODE="${WANDB_MODE:-offline}"
  fi
  export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-$CACHES/inductor}"
  export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$CACHES/triton}"
  export VLLM_CACHE_ROOT="${VLLM_CACHE_ROOT:-$CACHES/vllm}" VLLM_NO_USAGE_STATS=1
  export TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1 RAY_DEDUP_LOGS="${RAY_DEDUP_LOGS:-1}"
  # Ray asks for a token, so that nobody else on these nodes can run code in this cluster.
  export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="${RAY_AUTH_TOKEN_PATH:-$LOGS/.ray_token}"
  if [ -n "$NETWORK_INTERFACE" ]; then
    export NCCL_SOCKET_IFNAME=$NETWORK_INTERFACE GLOO_SOCKET_IFNAME=$NETWORK_INTERFACE
  fi
}

make_token() {
  (umask 077 && od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$RAY_AUTH_TOKEN_PATH")
}

# The IPv4 address of this node on the chosen interface.
own_address() {
  if [ -n "$NETWORK_INTERFACE" ]; then
    ip -4 -o addr show dev "$NETWORK_INTERFACE" | awk '{sub("/.*", "", $4); print $4; exit}'
  else
    hostname -I | awk '{print $1}'
  fi
}

# sweep VARIABLE=VALUE: ends all processes that were started with it, and what these start meanwhile. Ray's agents and
# workers outlive their raylet.
sweep() {
  local file found=yes tries=0
  while [ -n "$found" ] && [ "$((tries += 1))" -le 20 ]; do
    found=""
    for file in /proc/[0-9]*/environ; do
      if grep -zqxF -- "$1" "$file" 2>/dev/null; then
        found=yes
        file=${file#/proc/}
        kill -KILL "${file%/environ}" 2>/dev/null || true
      fi
    done
    [ -z "$found" ] || sleep 0.1
  done
}

# ray_on_node NAME [--head]: Ray on this node until it is told to end.
ray_on_node() {
  local name=$1 role=${2:-} folder=$RAY_FOLDER-$1 ray code=0
  local arguments=(--block --disable-usage-stats "--node-name=$name" "--num-gpus=$GPUS_PER_NODE" "--temp-dir=$folder")
  [ "$GPUS_PER_NODE" != 0 ] || arguments+=("--resources={\"fastkd_slot\": $WORKERS_PER_NODE}")
  [ -z "${CPUS_PER_NODE:-}" ] || arguments+=("--num-cpus=$CPUS_PER_NODE")
  [ -z "${RAY_MEMORY:-}" ] || arguments+=("--object-store-memory=$RAY_MEMORY")
  if [ "$role" = --head ]; then
    arguments+=(--head "--port=$RAY_PORT" "--node-ip-address=$HEAD_ADDRESS" --include-dashboard=false)
  else
    arguments+=("--address=$HEAD_ADDRESS:$RAY_PORT")
    [ -z "$NETWORK_INTERFACE" ] || arguments+=("--node-ip-address=$(own_address)")
  fi
  trap : TERM INT # Slurm's reach Ray too; this shell tidies up after it
  # RAY_ADDRESS would make it join that cluster; and there is nothing to drain that a driver still waits for.
  env -u RAY_ADDRESS RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0 FASTKD_RAY="$folder" ray start "${arguments[@]}" &
  ray=$!
  # The word to end is a file: ending the step would be a KILL, and `ray stop` ends every Ray of this user on the node.
  while kill -0 "$ray" 2>/dev/null && [ ! -e "$LOGS/.ending" ]; do
    sleep 1 &
    wait -n "$ray" $! || true
  done
  kill -TERM "$ray" 2>/dev/null || true
  for _ in $(seq 80); do # a loaded node takes its time; the sweep does not, and must come before the step is killed
    kill -0 "$ray" 2>/dev/null || break
    sleep 0.1 || true
  done
  kill -KILL "$ray" 2>/dev/null || true
  wait "$ray" || code=$?
  sweep "FASTKD_RAY=$folder"
  if [ -e "$LOGS/.ending" ]; then code=0; else echo "$name: Ray ended with code $code" >>"$LOGS/failed-nodes"; fi
  [ ! -e "$LOGS/.succeeded" ] || rm -rf "$folder" # else its logs are worth reading
  return "$code"
}

# background COMMAND…: in a process group of its own; its id is in $started.
background() {
  set -m
  "$@" </dev/null >/dev/null 2>&1 &
  started=$!
  set +m
}

# wait_for_nodes COUNT: until so many have joined. Fails when the head ends or START_SECONDS pass.
wait_for_nodes() {
  join() { exec python "$here/wait_nodes.py" "$HEAD_ADDRESS:$RAY_PORT" "$1" "$START_SECONDS" >>"$LOGS/status.log" 2>&1; }
  background join "$1"
  waiting_pid=$started
  while kill -0 "$waiting_pid" 2>/dev/null; do
    if [ -e "$LOGS/failed-nodes" ]; then
      say "Ray did not start: $(cat "$LOGS/failed-nodes"); see head.log and worker-*.log in $LOGS"
      return 1
    fi
    [ -z "$stopping" ] || return 1
    sleep 1 &
    wait $! || true
  done
  wait "$waiting_pid"
}

# run_driver COMMAND…: its exit code. The driver has a process group of its own, so that a signal reaches it once, and a
# KILL all that it started.
run_driver() {
  export RAY_ADDRESS="$HEAD_ADDRESS:$RAY_PORT"
  set -m
  "$@" </dev/null >>"$LOGS/driver.log" 2>&1 &
  driver_pid=$!
  set +m
  say "driver started: $*"
  background watch_cluster
  status_pid=$started
  local code=0 again=0
  while :; do
    code=0
    wait "$driver_pid" || code=$?
    kill -0 "$driver_pid" 2>/dev/null || break # else a signal of ours ended the wait
  done
  wait "$driver_pid" || again=$? # a signal at the same moment would have hidden the driver's own code
  [ "$again" = 127 ] || code=$again
  [ "$code" != 0 ] || touch "$LOGS/.succeeded"
  return "$code"
}

# Walltime, scancel or a lost head: the driver saves and exits 0 on SIGTERM. Who does not end in time is killed.
on_signal() {
  say "got SIG$1"
  stopping=$1
  [ -z "$driver_pid" ] || [ -n "$killer_pid" ] || stop_driver
}

stop_driver() {
  kill -0 "$driver_pid" 2>/dev/null || return 0
  say "the driver is to save and end within $SAVE_SECONDS s"
  kill -TERM -- "-$driver_pid" 2>/dev/null || true
  background kill_driver
  killer_pid=$started
}

kill_driver() {
  sleep "$SAVE_SECONDS"
  printf '%(%F %T)T the driver did not end in time: killed\n' -1 >>"$LOGS/job.log"
  kill -KILL -- "-$driver_pid"
}

# In the background: what Ray says now and then, and whether its head is still there.
watch_cluster() {
  local next=$((SECONDS + STATUS_SECONDS))
  while sleep 5; do
    if ! kill -0 "$head_pid"; then
      printf '%(%F %T)T the Ray head is gone; see %s\n' -1 "$LOGS/head.log" >>"$LOGS/job.log"
      kill -TERM -- "-$driver_pid"
      sleep 60 # it has nobody to save with, but may say what happened
      kill -KILL -- "-$driver_pid"
      return
    fi
    if [ "$SECONDS" -ge "$next" ]; then
      next=$((SECONDS + STATUS_SECONDS))
      { date '+%F %T'; timeout 60 ray status --address "$HEAD_ADDRESS:$RAY_PORT"; } >>"$LOGS/status.log" 2>&1
    fi
  done
}

# ended PID: wait until it has, then KILL it.
ended() {
  local tries
  [ -n "$1" ] || return 0
  for tries in $(seq 250); do
    kill -0 "$1" 2>/dev/null || return 0
    sleep 0.1
  done
  kill -TERM "$1" 2>/dev/null || true # for srun that means: kill the step
}

clean_up() {
  trap - EXIT TERM USR1 INT
  touch "$LOGS/.ending"
  local group
  for group in "$killer_pid" "$status_pid" "$waiting_pid"; do
    [ -z "$group" ] || kill -TERM -- "-$group" 2>/dev/null || true
  done
  [ -z "$driver_pid" ] || kill -KILL -- "-$driver_pid" 2>/dev/null || true # what the driver left behind
  ended "$worker_pid"
  ended "$head_pid"
  wait
}
