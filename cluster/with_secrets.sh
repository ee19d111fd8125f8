#!/usr/bin/env bash
# Entry point of the cluster image: turns secret files into what Ray and MLflow read, then runs the command.
# Secrets come as files (compose and Kubernetes mount them in /run/secrets); none is ever part of an image or a command line.
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
