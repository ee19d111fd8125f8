#!/usr/bin/env bash
# Run one Ray node in the foreground: start_node.sh head | views | trainers | both
#
#   HVP_HEAD            host name of the head (default: head)
#   HVP_SLOTS           how many view workers or trainers the node takes (default: 1)
#   HVP_CPUS            CPUs that it offers (default: one for each slot, of both kinds)
#   HVP_STORE_BYTES     its object store (default: 500 MB; must fit into /dev/shm)
#   HVP_METRICS_PORT    where Prometheus reads (default: 8080; no authentication, see docs/operations.md)
#   RAY_NODE_IP         the node's own address, if it has several
#   HVP_DASHBOARD_HOST  address on which the head accepts `ray job submit` (default: 127.0.0.1). To any other one, nodes and
#                       clients send the token in clear text: Ray has no TLS for it
#   RAY_AUTH_TOKEN_PATH file with the token, the same on all nodes (default: ~/.ray/auth_token)
#   RAY_USE_TLS         0: no encryption between nodes; the variables of certificates are in with_tls.sh (default: 1)
#
# Further arguments go to `ray start`. Without a token nothing starts: Ray would accept jobs from any host. Without
# certificates nothing starts either: the token and all pixels would cross the network in clear text.
#
# A node that loses the head ends. Its supervisor (compose, Kubernetes, systemd) starts it again, and it joins again.
set -euo pipefail
role=${1:?role: head, views, trainers or both}
shift
slots=${HVP_SLOTS:-1}
store=${HVP_STORE_BYTES:-500000000}
head=${HVP_HEAD:-head}
cpus=${HVP_CPUS:-$slots}

export RAY_AUTH_MODE=${RAY_AUTH_MODE:-token}
export RAY_USAGE_STATS_ENABLED=${RAY_USAGE_STATS_ENABLED:-0}
export RAY_USAGE_STATS_REPORT_URL=${RAY_USAGE_STATS_REPORT_URL:-http://127.0.0.1:9/}
token=${RAY_AUTH_TOKEN_PATH:-${HOME:-}/.ray/auth_token}
if [ "$RAY_AUTH_MODE" = token ] && [ -z "${RAY_AUTH_TOKEN:-}" ] && [ ! -s "$token" ]; then
    echo "start_node.sh: no token in $token: make one on one machine, (umask 077; RAY_AUTH_MODE=token ray get-auth-token" \
        "--generate), and copy it to ~/.ray/auth_token on every node and on every machine that submits jobs" >&2
    exit 2
fi

export HVP_TLS_NAMES=${HVP_TLS_NAMES:-}
[ "$role" != head ] || HVP_TLS_NAMES+=" $head" # the others call it by this name
with_tls=$(dirname "$0")/with_tls.sh
common=(--block --disable-usage-stats --object-store-memory="$store" --metrics-export-port="${HVP_METRICS_PORT:-8080}")
if [ -n "${RAY_NODE_IP:-}" ]; then common+=(--node-ip-address="$RAY_NODE_IP"); fi
case $role in
head)
    # A node that does not answer for 5 x 3 s counts as dead, so a cut link is detected in 20 s instead of 65.
    export RAY_health_check_period_ms=${RAY_health_check_period_ms:-1000}
    export RAY_health_check_timeout_ms=${RAY_health_check_timeout_ms:-3000}
    export RAY_health_check_failure_threshold=${RAY_health_check_failure_threshold:-5}
    exec "$with_tls" ray start --head --port=6379 --dashboard-host="${HVP_DASHBOARD_HOST:-127.0.0.1}" --num-cpus=0 "${common[@]}" "$@"
    ;;
views)    resources="{\"view\": $slots}" ;;
trainers) resources="{\"trainer\": $slots}" ;;
both)
    resources="{\"view\": $slots, \"trainer\": $slots}"
    cpus=${HVP_CPUS:-$((2 * slots))}
    ;;
*)
    echo "start_node.sh: unknown role $role; expected head, views, trainers or both" >&2
    exit 2
    ;;
esac
exec "$with_tls" ray start --address="$head:6379" --num-cpus="$cpus" --resources="$resources" "${common[@]}" "$@"
