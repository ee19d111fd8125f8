#!/usr/bin/env bash
# Entry point of the cluster image: passes secret files to Ray and MLflow, then runs the command.
# Compose and Kubernetes mount secrets as files in /run/secrets. No image and no command line contains one.
set -euo pipefail
secrets=${HVP_SECRETS:-/run/secrets}

if [ -r "$secrets/ray_token" ]; then
    export RAY_AUTH_TOKEN_PATH="$secrets/ray_token"
fi
if [ -r "$secrets/mlflow_password" ]; then
    export MLFLOW_TRACKING_USERNAME=${MLFLOW_TRACKING_USERNAME:-admin}
    MLFLOW_TRACKING_PASSWORD=$(cat "$secrets/mlflow_password")
    export MLFLOW_TRACKING_PASSWORD
fi
exec "$@"
