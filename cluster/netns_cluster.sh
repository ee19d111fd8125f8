#!/usr/bin/env bash
# Simulate three hosts by network namespaces: head (with MLflow), trainer (which also renders a little), views. Each runs `ray
# start`, and all connections use TLS. One job runs undisturbed. During the other job
#   - the link of the view host is cut for 20 s,
#   - the trainer's host is killed and started again,
#   - the link of the view host is cut permanently.
# Both jobs must end with the same weights, bit for bit, and each step once in metrics.jsonl. Prints one line at the end.
#
# tcpdump records the link. First two hosts run without TLS, to show that the search (clear_text.py) finds image headers, the
# token and metric names there. In the record of both jobs it must find none of them.
#
# Needs root, `ip` (iproute2) and openssl; without tcpdump it records nothing and says so. Changes nothing outside its own
# namespaces. Takes about six minutes on 2 cores.
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
capture=
longest_capture=1000000000 # bytes
network=10.77.$(($$ % 256)) # of its own: a starting head takes a GCS with its address in any namespace for its own
declare -A address=([head]=$network.1 [trainer]=$network.2 [views]=$network.3)

export PATH=$bin:$PATH
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$folder/token
export RAY_USAGE_STATS_ENABLED=0 RAY_USAGE_STATS_REPORT_URL=http://127.0.0.1:9/ MLFLOW_DISABLE_TELEMETRY=true
for secret in token password; do
    (umask 077 && head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' > "$folder/$secret")
done
export RAY_USE_TLS=1 RAY_TLS_CA_CERT=$folder/tls/ca.crt
cluster/make_certificate.sh "$folder/tls"
export MLFLOW_TRACKING_SERVER_CERT_PATH=$RAY_TLS_CA_CERT MLFLOW_TRACKING_USERNAME=admin
MLFLOW_TRACKING_PASSWORD=$(cat "$folder/password")
export MLFLOW_TRACKING_PASSWORD

namespace() { echo "$id-$1"; }

on() { # host command...: run a command on a host
    local host=$1
    shift
    ip netns exec "$(namespace "$host")" env RAY_TMPDIR="$folder/$host" RAY_NODE_IP="${address[$host]}" \
        RAY_TLS_SERVER_CERT="$folder/tls/$host.crt" RAY_TLS_SERVER_KEY="$folder/tls/$host.key" "$@"
}

kill_host() { # everything on a host at once, as if its plug were pulled
    local pids
    pids=$(ip netns pids "$(namespace "$1")" 2> /dev/null || true)
    # shellcheck disable=SC2086
    [ -z "$pids" ] || kill -9 $pids 2> /dev/null || true
}

clean_up() {
    [ -z "$capture" ] || end_capture
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
            on "$host" HVP_HEAD="${address[head]}" HVP_SLOTS="$slots" HVP_STORE_BYTES=200000000 \
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
    on head RAY_API_SERVER_ADDRESS=http://127.0.0.1:8265 ray job submit -- \
        python pipelines/pretrain.py simsiam-digits --run.name "$1" --run.output "$folder/runs" \
        --tracking.uri "https://${address[head]}:5000" \
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

start_mlflow() { # on the head
    cat > "$folder/basic_auth.ini" << END
[mlflow]
default_permission = READ
database_uri = sqlite:///$folder/auth.db
admin_username = admin
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
auth_cache_ttl_seconds = 60
END
    on head MLFLOW_AUTH_CONFIG_PATH="$folder/basic_auth.ini" MLFLOW_AUTH_ADMIN_PASSWORD="$MLFLOW_TRACKING_PASSWORD" \
        MLFLOW_FLASK_SERVER_SECRET_KEY=for-this-test-only MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false \
        mlflow server --app-name basic-auth --workers 1 --host "${address[head]}" --port 5000 \
        --uvicorn-opts "--ssl-keyfile $folder/tls/head.key --ssl-certfile $folder/tls/head.crt" \
        --backend-store-uri "sqlite:///$folder/mlflow.db" --artifacts-destination "$folder/artifacts" \
        --allowed-hosts "${address[head]}:5000" > "$folder/mlflow.log" 2>&1 &
    for _ in $(seq 120); do
        ! on trainer python -c "
import ssl, urllib.request as r
r.urlopen('https://${address[head]}:5000/health', context=ssl.create_default_context(cafile='$RAY_TLS_CA_CERT'))" \
            2> /dev/null || return 0
        sleep 1
    done
    fail "MLflow did not start (mlflow.log)"
}

start_capture() { # name
    command -v tcpdump > /dev/null || return 0
    (
        # `head` ends tcpdump when the file is full.
        ip netns exec $switch tcpdump -i br0 --snapshot-length=0 --buffer-size=65536 -U -w - 2> "$folder/$1.tcpdump" |
            head -c $longest_capture > "$folder/$1.pcap"
    ) &
    capture=$!
}

end_capture() {
    [ -n "$capture" ] || return 0
    sleep 1 # for the last packets
    local pids
    pids=$(ip netns pids $switch)
    # shellcheck disable=SC2086
    [ -z "$pids" ] || kill -INT $pids
    wait "$capture" || true
    capture=
}

check_capture() { # name, least MB, all | none: what the search must find
    command -v tcpdump > /dev/null || return 0
    local counts recorded
    recorded=$(($(stat -c %s "$folder/$1.pcap") / 1000000))
    [ "$recorded" -ge "$2" ] || fail "only $recorded MB were recorded in $1.pcap, expected at least $2"
    counts=$(python cluster/clear_text.py find "$folder/$1.pcap" "$folder/token" "$folder/password")
    echo "netns_cluster: $1: $recorded MB recorded on the link, in clear text: $counts"
    python - "$3" "$counts" << 'END' || fail "$1.pcap: expected $3 of these values in clear text"
import json, sys
expected, counts = sys.argv[1], json.loads(sys.argv[2])
if expected == "all":
    del counts["password"] # nothing logs in to MLflow without TLS
sys.exit(any((count > 0) != (expected == "all") for count in counts.values()))
END
}

wait_for_nodes() { # number
    local alive
    for _ in $(seq 90); do
        alive=$(on head python -c "
import ray; ray.init('${address[head]}:6379', log_to_driver=False, logging_level='ERROR')
print(sum(node['Alive'] for node in ray.nodes()))" 2> /dev/null | tail -1 || echo 0)
        [ "${alive:-0}" != "$1" ] || return 0
        sleep 1
    done
    fail "$1 nodes did not come up"
}

send_values() { on head python cluster/clear_text.py send "${address[head]}:6379" > "$folder/send.log" 2>&1; }

cd "$repository"
make_network
if command -v tcpdump > /dev/null; then
    export RAY_USE_TLS=0
    start_capture without-tls
    start_host head head 0
    start_host views views 2
    wait_for_nodes 2
    send_values || fail "clear_text.py sent nothing without TLS (send.log)"
    end_capture
    stop_host views
    stop_host head
    rm -rf "$folder/head/ray" # Ray takes the address in it for a cluster that runs
    check_capture without-tls 3 all
    export RAY_USE_TLS=1
else
    echo "netns_cluster: the link is not recorded: tcpdump is not installed"
fi

start_capture with-tls
start_host head head 0
start_host trainer both 1
start_host views views 2
wait_for_nodes 3
send_values || fail "clear_text.py sent nothing with TLS (send.log)"
start_mlflow
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
end_capture
check_capture with-tls 10 none

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
