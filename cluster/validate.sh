#!/usr/bin/env bash
# Check everything in this folder, and docker-compose.yml, without Docker, Kubernetes or a network.
#
#   cluster/validate.sh                        tools of .venv (make setup)
#   KUBERAY_CRDS=FOLDER cluster/validate.sh    compare with KubeRay's own definitions too (helm-chart/kuberay-operator/crds)
#
# All checks run; the exit status is 1 if one of them fails.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=${VENV_BIN:-$PWD/.venv/bin}
failed=0

check() { # WHAT COMMAND...
    local what=$1 findings
    shift
    if findings=$("$@" 2>&1); then
        echo "ok      $what"
    else
        failed=1
        echo "FAILED  $what"
        printf '        %s\n' "${findings//$'\n'/$'\n'        }"
    fi
}

mapfile -t manifests < <(find cluster/kubernetes -maxdepth 1 -name '*.yaml' | sort)
mapfile -t scripts < <(find . \( -name .venv -o -name .git -o -name runs -o -name build \) -prune -o -name '*.sh' -print | sort)
yaml=(cluster/kubernetes)
for file in docker-compose.yml cluster/ray-up.yaml; do
    [ ! -e "$file" ] || yaml+=("$file")
done
crds=()
[ -z "${KUBERAY_CRDS:-}" ] || crds=(--crds "$KUBERAY_CRDS")

check "YAML: duplicate keys, indentation (yamllint)" \
    "$bin/yamllint" --strict --config-file cluster/.yamllint "${yaml[@]}"
check "Kubernetes, KubeRay, kustomize: unknown keys, wrong types (check_manifests.py)" \
    "$bin/python" cluster/kubernetes/check_manifests.py "${crds[@]}" "${manifests[@]}"
if [ -e docker-compose.yml ]; then
    check "docker-compose.yml against the Compose specification (check-jsonschema)" \
        "$bin/check-jsonschema" --builtin-schema vendor.compose-spec docker-compose.yml
fi
if [ -e cluster/ray-up.yaml ]; then
    check "ray-up.yaml against Ray's schema (check-jsonschema)" \
        "$bin/check-jsonschema" --schemafile \
        "$("$bin/python" -c 'import importlib.util as u; print(u.find_spec("ray").submodule_search_locations[0])')/autoscaler/ray-schema.json" \
        cluster/ray-up.yaml
fi
if [ -e cluster/Dockerfile ]; then
    check "Dockerfile (hadolint)" "$bin/hadolint" --no-color --failure-threshold warning cluster/Dockerfile
fi
check "shell scripts (shellcheck)" "$bin/shellcheck" --severity=warning --external-sources .ci/run "${scripts[@]}"
exit "$failed"
