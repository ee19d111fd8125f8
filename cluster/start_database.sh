#!/usr/bin/env bash
# Run PostgreSQL for the MLflow server: databases `mlflow` and `mlflow_auth`, role `mlflow`, password from a file, TLS.
#
#   HVP_TLS  folder with database.crt and database.key (default: /run/secrets)
set -euo pipefail
secrets=${HVP_SECRETS:-/run/secrets}
tls=${HVP_TLS:-$secrets}
bin=$(ls -d /usr/lib/postgresql/*/bin | sort -V | tail -1)
export PGDATA=/database/data

if [ ! -s "$PGDATA/PG_VERSION" ]; then
    # Written to a temporary path and moved when complete, so that a killed container starts over.
    rm -rf "$PGDATA" /database/new
    "$bin/initdb" --pgdata=/database/new --username=postgres --auth=reject --encoding=UTF8 --locale=C.UTF-8 > /dev/null
    {
        printf "CREATE ROLE mlflow LOGIN PASSWORD '%s';\n" "$(cat "$secrets/database_password")"
        printf 'CREATE DATABASE mlflow OWNER mlflow;\nCREATE DATABASE mlflow_auth OWNER mlflow;\n'
    } | "$bin/postgres" --single -D /database/new postgres > /dev/null
    mv /database/new "$PGDATA"
fi
# The network admits only the role of MLflow, which is no superuser, and only with its password over TLS.
printf 'hostssl mlflow,mlflow_auth mlflow all scram-sha-256\n' > "$PGDATA/pg_hba.conf"
exec "$bin/postgres" -c ssl=on -c ssl_cert_file="$tls/database.crt" -c ssl_key_file="$tls/database.key" \
    -c listen_addresses='*' -c unix_socket_directories=/tmp
