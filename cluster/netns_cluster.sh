#!/usr/bin/env bash
# Simulate three hosts by network namespaces: head, trainer (which also renders a little), views. Each runs `ray start`. One
# job runs undisturbed. During the other job
#   - the link of the view host is cut for 20 s,
#   - the trainer's host is killed and started again,
#   - the link of the view host is cut permanently.
# Both jobs must end with the same weights, bit for bit, and each step once in metrics.jsonl. Prints one line at the end.
#
# Needs root and `ip` (iproute2); changes nothing outside its own namespaces. Takes about five minutes on 2 cores.
#   cluster/netns_cluster.sh [FOLDER FOR RUNS AND LOGS]
set -euo pipefail
cd "$(dirname "$0")/.."
repository=$PWD
bin=${HVP_BIN:-$repository/.venv/bin}
cut_seconds=${HVP_CUT_SECONDS:-20}
epochs=${HVP_EPOCHS:-12}

if [ "$(id -u)" != 0 ] || ! command -v ip > /dev/null || ! ip netns list > /dev/null 2>&1; then
    echo "netns_cluster: skipped: needs root and ip (iproute2) with network namespaces"
    exit 0
fi
folder=${1:-$(mktemp --directory /tmp/hvpns.XXXX)}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
id=n$$
switch=$id-sw
declare -A supervisors=()
declare -A address=([head]=10.77.0.1 [trainer]=10.77.0.2 [views]=10.77.0.3)

export PATH=$bin:$PATH
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$folder/token
export RAY_USAGE_STATS_ENABLED=0 RAY_USAGE_STATS_REPORT_URL=http://127.0.0.1:9/ MLFLOW_DISABLE_TELEMETRY=true
(umask 077 && head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' > "$folder/token")

namespace() { echo "$id-$1"; }

on() { # host command...: run a command on a host
    local host=$1
    shift
    ip netns exec "$(namespace "$host")" env "$@"
}

kill_host() { # everything on a host at once, as if its plug were pulled
    local pids
    pids=$(ip netns pids "$(namespace "$1")" 2> /dev/null || true)
    # shellcheck disable=SC2086
    [ -z "$pids" ] || kill -9 $pids 2> /dev/null || true
}

clean_up() {
    for host in head trainer views; do
        stop_host $host # the supervisor first, or it would start the node again
        ip netns del "$(namespace $host)" 2> /dev/null || true
        rm -rf "/etc/netns/$(namespace $host)"
    done
    ip netns del $switch 2> /dev/null || true
}
trap clean_up EXIT

fail() {
    echo "netns_cluster: FAILED: $*; logs are in $folder" >&2
    exit 1
}

make_network() {
    ip netns add $switch
    ip -n $switch link add br0 type bridge
    ip -n $switch link set br0 up
    local host space
    for host in head trainer views; do
        space=$(namespace $host)
        ip netns add "$space"
        ip -n "$space" link set lo up
        ip link add eth0 netns "$space" type veth peer name "to_$host" netns $switch
        ip -n $switch link set "to_$host" master br0 up
        ip -n "$space" address add "${address[$host]}/24" dev eth0
        ip -n "$space" link set eth0 up
        mkdir -p "/etc/netns/$space"
        : > "/etc/netns/$space/resolv.conf"
        printf '127.0.0.1 localhost\n%s %s\n' "${address[$host]}" "$(hostname)" > "/etc/netns/$space/hosts"
    done
}

start_host() { # host, role, slots: a supervisor that starts the node again whenever it ends, as compose and systemd do
    local host=$1 role=$2 slots=$3
    mkdir -p "$folder/$host"
    (
        while true; do
            on "$host" RAY_TMPDIR="$folder/$host" RAY_NODE_IP="${address[$host]}" HVP_HEAD="${address[head]}" \
                HVP_SLOTS="$slots" HVP_STORE_BYTES=200000000 HVP_DASHBOARD_HOST="${address[head]}" \
                HVP_CPUS=2 "$repository/cluster/start_node.sh" "$role" >> "$folder/$host.log" 2>&1 || true
            sleep 1
        done
    ) &
    supervisors[$host]=$!
}

stop_host() {
    kill -9 "${supervisors[$1]:-}" 2> /dev/null || true
    wait "${supervisors[$1]:-}" 2> /dev/null || true
    kill_host "$1"
}

submit() { # run name
    on head RAY_API_SERVER_ADDRESS="http://${address[head]}:8265" ray job submit -- \
        python pipelines/pretrain.py simsiam-digits --run.name "$1" --run.output "$folder/runs" --tracking.uri none \
        --training.epochs "$epochs" --training.checkpoint_every_steps 50 --cluster.num_view_workers 2 \
        --tracking.log_every_steps 1 \
        --cluster.late_seconds 5 > "$folder/$1.log" 2>&1
}

steps_done() { # run: the last recorded step
    { cat "$folder/runs/$1"/log/*/metrics.jsonl 2> /dev/null || true; } | awk -F'[:,]' '/}$/ {step = $2} END {print step + 0}'
}

wait_for_step() { # run name, step
    local deadline=$((SECONDS + 240))
    while [ "$(steps_done "$1")" -lt "$2" ]; do
        kill -0 "$job" 2> /dev/null || fail "the job ended before step $2"
        [ $SECONDS -lt $deadline ] || fail "step $2 of $1 did not come within 240 s"
        sleep 0.3
    done
}

link() { ip -n "$(namespace "$1")" link set eth0 "$2"; }

event() {
    echo "$(date +%s.%N) $1" >> "$folder/events"
    echo "netns_cluster: step $(steps_done disturbed): $1"
}

cd "$repository"
make_network
start_host head head 0
start_host trainer both 1
start_host views views 2
for _ in $(seq 90); do
    alive=$(on head RAY_TMPDIR="$folder/head" python -c "
import ray; ray.init('${address[head]}:6379', log_to_driver=False, logging_level='ERROR')
print(sum(node['Alive'] for node in ray.nodes()))" 2> /dev/null | tail -1 || echo 0)
    [ "${alive:-0}" != 3 ] || break
    sleep 1
done
[ "${alive:-0}" = 3 ] || fail "the three nodes did not come up"
echo "netns_cluster: three hosts are up; the undisturbed run begins"

submit calm || fail "the undisturbed run ended with an error (calm.log)"
steps=$(steps_done calm)

submit disturbed &
job=$!
wait_for_step disturbed $((steps / 5))
event "the link of the view host is cut for $cut_seconds s"
link views down
sleep "$cut_seconds"
link views up
event "the link is back"
wait_for_step disturbed $((steps * 2 / 5))
event "the trainer's host is killed"
stop_host trainer
sleep 5
start_host trainer both 1
event "the trainer's host starts again"
wait_for_step disturbed $((steps * 7 / 10))
event "the link of the view host is cut for good"
link views down
wait $job || fail "the disturbed run ended with an error (disturbed.log)"

python - "$folder" << 'END' || fail "the runs differ"
import json, sys
from pathlib import Path

folder = Path(sys.argv[1])
runs = {name: folder / "runs" / name for name in ("calm", "disturbed")}
summary = {name: json.loads((run / "summary.json").read_text()) for name, run in runs.items()}
records = {name: [json.loads(line) for line in (run / "metrics.jsonl").open()] for name, run in runs.items()}
for name, lines in records.items():
    assert [line["step"] for line in lines] == list(range(1, summary[name]["num_steps"] + 1)), f"{name}: steps"
events = [line.split(maxsplit=1) for line in (folder / "events").read_text().splitlines()]
pauses = []
for moment, text in events:
    if "is back" not in text and "again" not in text:
        after = [line["time"] for line in records["disturbed"] if line["time"] > float(moment)]
        before = max(line["time"] for line in records["disturbed"] if line["time"] <= float(moment))
        window = [before, *(t for t in after if t < float(moment) + 90)]
        pauses.append(max(b - a for a, b in zip(window, window[1:])))
same = summary["calm"]["weights_digest"] == summary["disturbed"]["weights_digest"]
of = summary["disturbed"]
print(
    f"netns_cluster: {'OK' if same else 'FAILED'}: {of['num_steps']} steps, each once; weights "
    f"{'equal to the bit' if same else 'DIFFER'} ({of['weights_digest'][:12]}); longest pause after the cut "
    f"{pauses[0]:.1f} s, after the kill of the trainer's host {pauses[1]:.1f} s, after the cut for good {pauses[2]:.1f} s; "
    f"{of['num_batches_repeated']} batches repeated since the last resume, {of['num_resumes']} resume(s)"
)
sys.exit(not same)
END
