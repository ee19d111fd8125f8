#!/usr/bin/env bash
# Test the compose cluster: build and start it, submit hard-view and random-view runs from a client container and from the
# host, try to access it without credentials, kill a view node and a trainer node during a run, stop MLflow for a minute.
# Then compare weights and curves. Needs a Docker engine and compose; without them it skips everything and ends with 0.
#
#   cluster/compose_check.sh            builds and checks everything, then removes it (about 20 minutes on 2 cores)
#   KEEP=1 cluster/compose_check.sh     leaves the cluster running
#   BASE_IMAGE=... HVP_BUILD_NETWORK=host cluster/compose_check.sh
set -euo pipefail
cd "$(dirname "$0")/.."
outage_seconds=${HVP_OUTAGE_SECONDS:-60}
epochs=${HVP_EPOCHS:-20}

if ! docker info > /dev/null 2>&1; then
    echo "compose_check: skipped: no Docker engine answers here"
    exit 0
fi
if docker compose version > /dev/null 2>&1; then
    compose=(docker compose)
elif command -v docker-compose > /dev/null; then
    compose=(docker-compose)
else
    echo "compose_check: skipped: neither docker compose nor docker-compose is installed"
    exit 0
fi
export COMPOSE_PROJECT_NAME=hvpcheck
export HVP_DASHBOARD_PORT=${HVP_DASHBOARD_PORT:-18265} HVP_MLFLOW_PORT=${HVP_MLFLOW_PORT:-15000}
export HVP_STORE_BYTES=200000000 HVP_SHM_SIZE=512mb

clean_up() {
    "${compose[@]}" logs --no-color > /tmp/compose_check.log 2>&1 || true
    [ -n "${KEEP:-}" ] || "${compose[@]}" down --volumes --timeout 5 > /dev/null 2>&1 || true
}
trap clean_up EXIT
say() { echo "compose_check: $*"; }
fail() {
    echo "compose_check: FAILED: $*; the containers' output is in /tmp/compose_check.log" >&2
    exit 1
}
on_head() { docker exec --interactive "$(docker ps -q --filter "label=com.docker.compose.project=$COMPOSE_PROJECT_NAME" \
    --filter label=com.docker.compose.service=head)" cluster/with_secrets.sh "$@"; } # not by compose, which is slow
client() { "${compose[@]}" run --rm -T client "$@"; }
containers() { "${compose[@]}" ps -q "$1"; }

# ---- up ---------------------------------------------------------------------------------------------------------------
cluster/make_secrets.sh
"${compose[@]}" build head database > /tmp/compose_check.build 2>&1 || fail "the build (/tmp/compose_check.build)"
"${compose[@]}" up --detach --scale views=2 --scale trainers=2 > /tmp/compose_check.up 2>&1 ||
    fail "the cluster did not start (/tmp/compose_check.up)"
alive=0
for _ in $(seq 120); do
    alive=$(on_head ray list nodes --format json 2> /dev/null | grep -o '"state": "ALIVE"' | wc -l || true)
    [ "$alive" != 5 ] || break
    sleep 2
done
[ "$alive" = 5 ] || fail "$alive of 5 nodes came up"
say "head, two view nodes, two trainer nodes, MLflow and its database are up"

# ---- access ------------------------------------------------------------------------------------------------------------
refused() { # what, command...: must fail
    local what=$1
    shift
    if "$@" > /tmp/compose_check.door 2>&1; then fail "not refused: $what"; fi
    say "refused: $what"
}
status() { curl --cacert cluster/secrets/ca.crt --silent --output /dev/null --write-out '%{http_code}' --max-time 10 "$@" || true; }
mlflow=https://127.0.0.1:$HVP_MLFLOW_PORT
password=$(cat cluster/secrets/mlflow_password)
refused "a job without a token" "${compose[@]}" run --rm -T -e RAY_AUTH_MODE=disabled client ray job submit -- true
refused "a job with a wrong token" \
    "${compose[@]}" run --rm -T -e RAY_AUTH_TOKEN=wrong -e RAY_AUTH_TOKEN_PATH= --entrypoint env client \
    ray job submit --address http://head:8265 -- true
refused "a driver with the token and without a certificate" \
    "${compose[@]}" run --rm -T -e RAY_ADDRESS=head:6379 client python -c \
    "from hvp_ray.launch.environment import prepare_ray_environment as prepare; prepare(); import hvp_ray.stream.connect as c; c.connect_ray(None)"
grep --quiet "it uses TLS and this program does not" /tmp/compose_check.door || fail "the refusal does not name TLS"
refused "MLflow without TLS" curl --fail --silent --max-time 10 "http://127.0.0.1:$HVP_MLFLOW_PORT/health"
[ "$(status "http://127.0.0.1:$HVP_DASHBOARD_PORT/api/jobs/")" = 401 ] || fail "the dashboard answers without a token"
say "refused: the dashboard's API without a token (401)"
foreign=$(hostname -I 2> /dev/null | tr ' ' '\n' | grep -v '^127\.' | sed -n 1p || true)
if [ -n "$foreign" ]; then
    refused "the dashboard from a foreign address" curl --silent --max-time 5 "http://$foreign:$HVP_DASHBOARD_PORT/"
    refused "MLflow from a foreign address" curl --insecure --silent --max-time 5 "https://$foreign:$HVP_MLFLOW_PORT/health"
fi
search="api/2.0/mlflow/experiments/search?max_results=1"
[ "$(status "$mlflow/$search")" = 401 ] || fail "MLflow answers without credentials"
say "refused: MLflow without credentials (401)"
[ "$(status --user "admin:wrong" "$mlflow/$search")" = 401 ] || fail "MLflow takes a wrong password"
say "refused: MLflow with a wrong password (401)"
[ "$(status --user "admin:$password" --header 'Host: evil.example' "$mlflow/$search")" = 403 ] ||
    fail "MLflow answers to a foreign Host header"
say "refused: MLflow with a foreign Host header (403)"
[ "$(status --user "admin:$password" "$mlflow/$search")" = 200 ] || fail "MLflow refuses the right password"
refused "writing into the code" on_head touch /opt/hvp_ray/hvp_ray/x.py
refused "being root" on_head test "$("${compose[@]}" exec -T head id -u)" = 0
refused "the database from a view node" "${compose[@]}" exec -T views python -c \
    "import socket; socket.create_connection(('database', 5432), timeout=5)"

# ---- runs -------------------------------------------------------------------------------------------------------------
short=(--training.epochs "$epochs" --training.checkpoint_every_steps 100 --cluster.num_view_workers 2
    --tracking.log_every_steps 1)
say "ray job submit -- python pipelines/pretrain.py, from a client container"
client ray job submit -- python pipelines/pretrain.py > /tmp/compose_check.literal 2>&1 ||
    fail "the literal job ended with an error (/tmp/compose_check.literal)"
grep -E "finished|trained encoder|curves" /tmp/compose_check.literal | sed 's/^/    /'

submit() { # log, arguments...
    local log=$1
    shift
    client ray job submit -- python pipelines/pretrain.py simsiam-digits "${short[@]}" "$@" > "$log" 2>&1
}
submit /tmp/compose_check.calm --run.name hard-calm || fail "hard-calm (/tmp/compose_check.calm)"
ray=${HVP_RAY:-$PWD/.venv/bin/ray}
if [ -x "$ray" ]; then
    say "ray job submit -- python pipelines/pretrain.py, from the host"
    RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=cluster/secrets/ray_token RAY_USAGE_STATS_ENABLED=0 \
        RAY_API_SERVER_ADDRESS=http://127.0.0.1:$HVP_DASHBOARD_PORT \
        "$ray" job submit -- python pipelines/pretrain.py simsiam-digits "${short[@]}" \
        --run.name random-calm --selection.rule first > /tmp/compose_check.host 2>&1 ||
        fail "random-calm (/tmp/compose_check.host)"
else
    say "not from the host: there is no $ray"
    submit /tmp/compose_check.host --run.name random-calm --selection.rule first || fail "random-calm"
fi

# ---- faults -----------------------------------------------------------------------------------------------------------
steps_done() { # run: the last recorded step
    { on_head sh -c "cat runs/$1/log/*/metrics.jsonl" 2> /dev/null || true; } | awk -F'[:,]' '/}$/ {step = $2} END {print step + 0}'
}
wait_for_step() { # run, step
    local deadline=$((SECONDS + 300))
    while [ "$(steps_done "$1")" -lt "$2" ]; do
        kill -0 "$job" 2> /dev/null || fail "$1 ended before step $2"
        [ $SECONDS -lt $deadline ] || fail "step $2 of $1 did not come within 300 s"
        sleep 1
    done
}
trainer_of() { # run: the container in which rank 0 works
    local host
    host=$(on_head sh -c "cat runs/$1/log/*/attempts.jsonl" | tail -1 | sed 's/.*"host": "\([^"]*\)".*/\1/')
    containers trainers | grep "^$host"
}
steps=$(steps_done hard-calm)

for rule in hard random; do
    options=(--run.name "$rule-disturbed")
    [ $rule = hard ] || options+=(--selection.rule first)
    submit "/tmp/compose_check.$rule" "${options[@]}" &
    job=$!
    wait_for_step $rule-disturbed $((steps / 5))
    view_node=$(containers views | sed -n 1p) # head would end the pipe early, and the script with it
    docker kill "$view_node" > /dev/null
    say "$rule-disturbed, step $(steps_done $rule-disturbed): kills a view node"
    wait_for_step $rule-disturbed $((steps * 2 / 5))
    docker start "$view_node" > /dev/null
    if [ $rule = hard ]; then
        "${compose[@]}" stop mlflow > /dev/null 2>&1
        say "$rule-disturbed, step $(steps_done $rule-disturbed): stops MLflow for $outage_seconds s"
        stopped_at=$SECONDS
    fi
    wait_for_step $rule-disturbed $((steps / 2))
    trainer_node=$(trainer_of $rule-disturbed)
    docker kill "$trainer_node" > /dev/null
    say "$rule-disturbed, step $(steps_done $rule-disturbed): kills the trainer's node (the other one replaces it)"
    if [ $rule = hard ]; then
        sleep $((outage_seconds - (SECONDS - stopped_at) > 0 ? outage_seconds - (SECONDS - stopped_at) : 0))
        "${compose[@]}" start mlflow > /dev/null 2>&1
        say "$rule-disturbed, step $(steps_done $rule-disturbed): starts MLflow again after $((SECONDS - stopped_at)) s"
    fi
    wait $job || fail "$rule-disturbed ended with an error (/tmp/compose_check.$rule)"
    docker start "$trainer_node" > /dev/null
done

on_head python - runs hard-calm=hard-disturbed random-calm=random-disturbed < cluster/check_runs.py |
    sed 's/^/compose_check: /' || fail "the runs differ"
say "OK: jobs from container and host, access refused without credentials, killed nodes and a stopped MLflow changed nothing"
