#!/usr/bin/env bash
# Run the MLflow server with PostgreSQL as its store, as a proxy of its artifacts, with basic authentication.
#
#   DATABASE_HOST          host of PostgreSQL (default: database)
#   MLFLOW_ALLOWED_HOSTS   accepted Host headers (others get 403)
#   MLFLOW_ALLOWED_ORIGINS pages that may call it from a browser
#   HVP_TLS                folder with ca.crt, mlflow.crt and mlflow.key (default: /run/secrets); without mlflow.crt nothing starts
#   /run/secrets/database_password, /run/secrets/mlflow_password
set -euo pipefail
secrets=${HVP_SECRETS:-/run/secrets}
tls=${HVP_TLS:-$secrets}
for file in ca.crt mlflow.crt mlflow.key; do
    if [ ! -r "$tls/$file" ]; then
        echo "start_mlflow.sh: $tls/$file cannot be read; cluster/make_secrets.sh makes it for compose" >&2
        exit 2
    fi
done
export PGPASSFILE=/tmp/pgpass MLFLOW_AUTH_CONFIG_PATH=/tmp/basic_auth.ini
umask 077

host=${DATABASE_HOST:-database}
# Read by PostgreSQL's library: it refuses a database without TLS, or with a certificate of another authority or host.
export PGSSLMODE=verify-full PGSSLROOTCERT=$tls/ca.crt
# PostgreSQL's own password file, so that the password is in no URI, no log and no process list.
printf '%s:5432:*:mlflow:%s\n' "$host" "$(cat "$secrets/database_password")" > "$PGPASSFILE"
cat > "$MLFLOW_AUTH_CONFIG_PATH" <<END
[mlflow]
default_permission = READ
database_uri = postgresql+psycopg2://mlflow@$host:5432/mlflow_auth
admin_username = admin
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
auth_cache_ttl_seconds = 60
END
MLFLOW_AUTH_ADMIN_PASSWORD=$(cat "$secrets/mlflow_password")
MLFLOW_FLASK_SERVER_SECRET_KEY=$(head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n')
export MLFLOW_AUTH_ADMIN_PASSWORD MLFLOW_FLASK_SERVER_SECRET_KEY
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false
unset MLFLOW_TRACKING_URI MLFLOW_TRACKING_USERNAME MLFLOW_TRACKING_PASSWORD

exec mlflow server --app-name basic-auth --workers 1 --host 0.0.0.0 --port 5000 \
    --uvicorn-opts "--ssl-keyfile $tls/mlflow.key --ssl-certfile $tls/mlflow.crt" \
    --backend-store-uri "postgresql+psycopg2://mlflow@$host:5432/mlflow" \
    --artifacts-destination /mlflow/artifacts \
    --allowed-hosts "${MLFLOW_ALLOWED_HOSTS:-mlflow:5000,localhost:*,127.0.0.1:*}" \
    --cors-allowed-origins "${MLFLOW_ALLOWED_ORIGINS:-https://localhost:5000,https://127.0.0.1:5000}"
