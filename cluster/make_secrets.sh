#!/usr/bin/env bash
# Make the secrets of the compose cluster: random values, and certificates of its own authority, in cluster/secrets/ that
# only this account (and the user of the containers) can read, and .env with the user's id. Safe to repeat: existing files
# stay, and certificates of MLflow and its database that expire within 90 days are made again. Nodes make theirs themselves.
set -euo pipefail
cd "$(dirname "$0")/.."
umask 077
mkdir -p cluster/secrets
for name in ray_token database_password mlflow_password; do
    file=cluster/secrets/$name
    [ -s "$file" ] || head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' > "$file"
done
cluster/make_certificate.sh cluster/secrets mlflow mlflow localhost 127.0.0.1
cluster/make_certificate.sh cluster/secrets database database
# Containers run with this user's id, so that they can read the files above, and never as root.
uid=$(id -u)
if [ "$uid" = 0 ]; then
    uid=1000
    chown -R "$uid" cluster/secrets
fi
touch .env
grep -q '^HVP_UID=' .env || echo "HVP_UID=$uid" >> .env
echo "secrets are in cluster/secrets/; MLflow: user admin, password: cat cluster/secrets/mlflow_password"
