#!/usr/bin/env bash
# One job of jobs/ on a Ray cluster of its own inside a Slurm allocation: a head without work on the first node, workers on all.
#   sbatch --nodes=4 --gpus-per-node=1 cluster/slurm.sh segment /share/specs/segment.yaml
# Submit from the root of a checkout. Needs: an environment with brainseg on every node (BRAINSEG_PYTHON names its python), and
# a shared folder for the token (BRAINSEG_SHARED; default: the folder you submit from). Ends with the job's own exit code.
#SBATCH --job-name=brainseg
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=32G
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
set -euo pipefail

if [[ $# -ne 2 ]]; then
    echo "usage: sbatch [options] $0 train|segment|report SPEC.yaml" >&2
    exit 2
fi
kind=$1
spec=$2
python=${BRAINSEG_PYTHON:-python}
job=${SLURM_JOB_ID:?this runs inside an allocation: sbatch $0}

# A folder of this job alone, for the one token that all its processes share. It stands on no command line, and goes at the end.
shared=$(mktemp --directory --tmpdir="${BRAINSEG_SHARED:-$PWD}" ".brainseg-$job-XXXXXX")
steps=()
tidy() {
    trap - EXIT TERM INT
    for step in "${steps[@]}"; do kill -TERM "$step" 2>/dev/null || true; done
    wait || true
    rm -rf -- "$shared"
}
trap tidy EXIT
trap 'exit 143' TERM
trap 'exit 130' INT
(umask 077 && "$python" -c 'import secrets; print(secrets.token_hex(32), end="")' >"$shared/token")
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$shared/token" RAY_USAGE_STATS_ENABLED=0
export OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=10000 MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=1073741824 MALLOC_ARENA_MAX=1
unset RAY_AUTH_TOKEN

# Jobs of other people may share a node: each has ports and a folder of its own. Paths of sockets must be short.
mapfile -t names < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${names[0]:?scontrol names no node}
if [[ -n ${BRAINSEG_INTERFACE:-} ]]; then # such as ib0: what joins the nodes, where a node has several addresses
    address=$(ip -o -4 addr show dev "$BRAINSEG_INTERFACE" | awk 'NR == 1 { sub("/.*", "", $4); print $4 }' || true)
    export GLOO_SOCKET_IFNAME=$BRAINSEG_INTERFACE NCCL_SOCKET_IFNAME=$BRAINSEG_INTERFACE
else
    address=$(getent ahostsv4 "$head" | awk '$1 !~ /^127\./ && !found++ { print $1 }' || true)
fi
if [[ -z $address ]]; then
    echo "$head has no address that other nodes reach; name its network interface in BRAINSEG_INTERFACE" >&2
    exit 2
fi
port=$((20000 + job % 500 * 20))
folder=/tmp/ray-$job

ray_start() { # ray_start NODES FIRST_WORKER_PORT LAST_WORKER_PORT WORDS...: one Ray node on each of so many Slurm nodes
    local nodes=$1 low=$2 high=$3
    shift 3
    srun --overlap --nodes="$nodes" --ntasks="$nodes" --cpus-per-task="$cpus" "${where[@]}" "$python" -m ray.scripts.scripts start --block \
        --temp-dir="$folder" --min-worker-port="$low" --max-worker-port="$high" --disable-usage-stats "$@" &
    steps+=("$!")
}

cpus=1 where=(--nodelist="$head" --gres=none)
ray_start 1 10002 10999 --head --port="$port" --node-ip-address="$address" --num-cpus=0 --num-gpus=0 \
    --object-store-memory=1000000000 --include-dashboard=false \
    --dashboard-agent-listen-port=$((port + 1)) --dashboard-agent-grpc-port=$((port + 2)) --runtime-env-agent-port=$((port + 3)) \
    --metrics-export-port=$((port + 4)) --node-manager-port=$((port + 5)) --object-manager-port=$((port + 6)) \
    --ray-client-server-port=$((port + 7))

export RAY_ADDRESS="$address:$port"
await_nodes() { # await_nodes NUMBER: until so many Ray nodes are there; the script ends after five minutes
    timeout 300 "$python" - "$1" <<'PYTHON'
import sys, time
import ray

wanted = int(sys.argv[1])
while True:
    try:
        ray.init(log_to_driver=False, logging_level=40)
        while sum(node["Alive"] for node in ray.nodes()) < wanted:
            time.sleep(2)
        break
    except ConnectionError:
        time.sleep(2)
PYTHON
}
await_nodes 1

cpus=${SLURM_CPUS_PER_TASK:-1} where=()
ray_start "$SLURM_JOB_NUM_NODES" 11000 19999 --address="$RAY_ADDRESS" --num-cpus="$cpus" \
    --dashboard-agent-listen-port=$((port + 11)) --dashboard-agent-grpc-port=$((port + 12)) --runtime-env-agent-port=$((port + 13)) \
    --metrics-export-port=$((port + 14)) --node-manager-port=$((port + 15)) --object-manager-port=$((port + 16))
await_nodes $((SLURM_JOB_NUM_NODES + 1))

echo "a Ray cluster of $SLURM_JOB_NUM_NODES worker(s) at $RAY_ADDRESS"
"$python" "jobs/$kind.py" "$spec" &
driver=$!
steps+=("$driver")
wait "$driver"
