#!/usr/bin/env bash
# NOT RUN by this project, which has no Slurm. Checked by shellcheck, and by a test in which programs in place of Slurm's
# and Ray's record how they are called.
#
# One run on a Slurm allocation: the head and the trainers on the nodes of the first group, view workers on those of the
# second (CPU nodes). Run it in the checkout, after `make setup`, at a path that is the same on all nodes:
#
#   sbatch cluster/slurm.sh simsiam-imagenet-r50-100ep --run.name NAME --data.source FOLDER ...
#
# Arguments after the file's name go to pipelines/pretrain.py. Submit the same line again after a time limit or a failure:
# a run with a name resumes. The lines below set the sizes of the groups. HVP_DEVICE=cpu trains without GPUs.
#SBATCH --job-name=hvp_ray
#SBATCH --output=slurm-%j.log
#SBATCH --signal=B:TERM@120
#SBATCH --nodes=1 --ntasks-per-node=1 --cpus-per-task=16 --gpus-per-node=1
#SBATCH hetjob
#SBATCH --nodes=2 --ntasks-per-node=1 --cpus-per-task=32
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?start this with sbatch}"
# shellcheck source=/dev/null
. .venv/bin/activate

trainers_per_node=${HVP_TRAINERS_PER_NODE:-1}
views_per_train_node=${HVP_VIEWS_PER_TRAIN_NODE:-0}
port=$((20000 + SLURM_JOB_ID % 10000)) # nodes may be shared with other jobs
train_cpus=${SLURM_CPUS_PER_TASK_HET_GROUP_0:?} view_cpus=${SLURM_CPUS_PER_TASK_HET_GROUP_1:?}
mapfile -t train_nodes < <(scontrol show hostnames "${SLURM_JOB_NODELIST_HET_GROUP_0:?expected a heterogeneous job}")
mapfile -t view_nodes < <(scontrol show hostnames "${SLURM_JOB_NODELIST_HET_GROUP_1:?expected a heterogeneous job}")
head_node=${train_nodes[0]}
# Address in the network that the nodes share; set HVP_HEAD_IP if the host's name resolves to another one.
head_ip=${HVP_HEAD_IP:-$(hostname --ip-address | cut -d ' ' -f 1)}

# A token for this job, in a file on the shared disk that only this account can read. Other users of a node could read a
# command line.
mkdir -p runs
state=$(mktemp --directory --tmpdir="$PWD/runs" .slurm-XXXXXXXX) # mode 0700
(umask 077; head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' > "$state/token")
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$state/token
# An authority for this job too. Each node makes its certificate in this folder.
cluster/make_certificate.sh "$state"
export RAY_USE_TLS=1 RAY_TLS_CA_CERT=$state/ca.crt
export RAY_USAGE_STATS_ENABLED=0 RAY_USAGE_STATS_REPORT_URL=http://127.0.0.1:9/
export RAY_TMPDIR=/tmp/hvp_ray_$SLURM_JOB_ID # short: Ray makes sockets in it
export RAY_health_check_period_ms=1000 RAY_health_check_timeout_ms=3000 RAY_health_check_failure_threshold=5

nodes=()
driver=
# shellcheck disable=SC2329 # called by trap
finish() {
    for process in "${nodes[@]}"; do kill "$process" 2> /dev/null || true; done
    wait || true
    rm -rf "$state"
}
trap finish EXIT
# Slurm's warning before the time limit goes to the driver, which lets the trainers write a checkpoint.
trap '[ -z "$driver" ] || kill -TERM "$driver"' TERM

# A node that loses the head ends. The loop starts it again, and it joins again.
# shellcheck disable=SC2016 # expanded on the node
keep_running='while true; do "$@" || true; sleep 5; done'
common=(--block --disable-usage-stats)
resources="{\"trainer\": $trainers_per_node, \"view\": $views_per_train_node}"

# Neither srun nor Ray reads the number of CPUs from the allocation, so set it for both.
srun --het-group=0 --nodes=1 --ntasks=1 --nodelist="$head_node" --cpus-per-task="$train_cpus" \
    env RAY_NODE_IP="$head_ip" cluster/with_tls.sh ray start --head --port="$port" --node-ip-address="$head_ip" --include-dashboard=false \
    --num-cpus="$train_cpus" --resources="$resources" "${common[@]}" &
nodes+=($!)
until RAY_NODE_IP=$head_ip cluster/with_tls.sh ray health-check --address "$head_ip:$port" > /dev/null 2>&1; do
    kill -0 "${nodes[0]}" || { echo "the head did not start" >&2; exit 1; }
    sleep 2
done
others=$((${#train_nodes[@]} - 1))
if [ "$others" -gt 0 ]; then
    srun --het-group=0 --nodes="$others" --ntasks="$others" --exclude="$head_node" \
        --cpus-per-task="$train_cpus" bash -c "$keep_running" node \
        cluster/with_tls.sh ray start --address="$head_ip:$port" --num-cpus="$train_cpus" --resources="$resources" "${common[@]}" &
    nodes+=($!)
fi
srun --het-group=1 --cpus-per-task="$view_cpus" bash -c "$keep_running" node \
    cluster/with_tls.sh ray start --address="$head_ip:$port" --num-cpus="$view_cpus" --resources="{\"view\": $view_cpus}" "${common[@]}" &
nodes+=($!)

# The driver runs on the head's node, in this script. With explicit numbers and device it waits for nodes that will join.
# Arguments override these options: the last value of an option counts.
recipe=${1:?usage: sbatch cluster/slurm.sh RECIPE [--section.field VALUE ...]}
shift
RAY_ADDRESS=$head_ip:$port RAY_NODE_IP=$head_ip cluster/with_tls.sh python pipelines/pretrain.py "$recipe" --cluster.placement labels \
    --cluster.device "${HVP_DEVICE:-cuda}" --cluster.num_trainers $((trainers_per_node * ${#train_nodes[@]})) \
    --cluster.num_view_workers $((view_cpus * ${#view_nodes[@]} + views_per_train_node * ${#train_nodes[@]})) "$@" &
driver=$!
status=0
wait "$driver" || status=$?
# A signal ends `wait` early; the driver needs some more seconds for its checkpoint.
if kill -0 "$driver" 2> /dev/null; then
    status=0
    wait "$driver" || status=$?
fi
exit "$status"
