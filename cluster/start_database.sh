#!/usr/bin/env bash
# Run PostgreSQL for the MLflow server: databases `mlflow` and `mlflow_auth`, role `mlflow`, password from a file.
set -euo pipefail
secrets=${HVP_SECRETS:-/run/secrets}
bin=$(ls -d /usr/lib/postgresql/*/bin | sort -V | tail -1)
export PGDATA=/database/data

if [ ! -s "$PGDATA/PG_VERSION" ]; then
    # Written to a temporary path and moved when complete, so that a killed container starts over.
    rm -rf "$PGDATA" /database/new
    "$bin/initdb" --pgdata=/database/new --username=postgres --auth=reject --encoding=UTF8 --locale=C.UTF-8 > /dev/null
    # The network admits only the role of MLflow, which is no superuser, and only with its password.
    printf 'host mlflow,mlflow_auth mlflow all scram-sha-256\n' > /database/new/pg_hba.conf
    {
        printf "CREATE ROLE mlflow LOGIN PASSWORD '%s';\n" "$(cat "$secrets/database_password")"
        printf 'CREATE DATABASE mlflow OWNER mlflow;\nCREATE DATABASE mlflow_auth OWNER mlflow;\n'
    } | "$bin/postgres" --single -D /database/new postgres > /dev/null
    mv /database/new "$PGDATA"
fi
exec "$bin/postgres" -c listen_addresses='*' -c unix_socket_directories=/tmp
