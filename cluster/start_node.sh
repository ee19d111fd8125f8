#!/usr/bin/env bash
# Run one Ray node in the foreground: start_node.sh head | views | trainers | both
#
#   HVP_HEAD            host name of the head (default: head)
#   HVP_SLOTS           how many view workers or trainers the node takes (default: 1)
#   HVP_CPUS            CPUs that it offers, where they are not as many as the slots
#   HVP_STORE_BYTES     its object store (default: 500 MB; must fit into /dev/shm)
#   HVP_METRICS_PORT    where Prometheus reads (default: 8080; no authentication, see docs/operations.md)
#   RAY_NODE_IP         the node's own address, where it has several
#   HVP_DASHBOARD_HOST  address on which the head answers to `ray job submit` (default: all of the container's)
#
# A node that loses the head ends; who started it (compose, Kubernetes, systemd) starts it again, and it joins anew.
set -euo pipefail
role=${1:?role: head, views, trainers or both}
slots=${HVP_SLOTS:-1}
store=${HVP_STORE_BYTES:-500000000}
head=${HVP_HEAD:-head}

common=(--block --disable-usage-stats --object-store-memory="$store" --metrics-export-port="${HVP_METRICS_PORT:-8080}")
if [ -n "${RAY_NODE_IP:-}" ]; then common+=(--node-ip-address="$RAY_NODE_IP"); fi
case $role in
head)
    # A node that does not answer for 5 x 3 s is given up: cut links are noticed in 20 s instead of 65.
    export RAY_health_check_period_ms=${RAY_health_check_period_ms:-1000}
    export RAY_health_check_timeout_ms=${RAY_health_check_timeout_ms:-3000}
    export RAY_health_check_failure_threshold=${RAY_health_check_failure_threshold:-5}
    exec ray start --head --port=6379 --dashboard-host="${HVP_DASHBOARD_HOST:-0.0.0.0}" --num-cpus=0 "${common[@]}"
    ;;
views)    resources="{\"view\": $slots}" ;;
trainers) resources="{\"trainer\": $slots}" ;;
both)     resources="{\"view\": $slots, \"trainer\": $slots}" ;;
*)
    echo "start_node.sh: unknown role $role; expected head, views, trainers or both" >&2
    exit 2
    ;;
esac
exec ray start --address="$head:6379" --num-cpus="${HVP_CPUS:-$slots}" --resources="$resources" "${common[@]}"
