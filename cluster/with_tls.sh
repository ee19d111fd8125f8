#!/usr/bin/env bash
# Run a command with the variables of Ray's TLS, after checking the certificate of this machine: Ray itself would wait
# without a message for a peer that it cannot verify. For nodes (start_node.sh uses it) and for drivers started by hand:
#
#   cluster/with_tls.sh ray start ... | python pipelines/pretrain.py ...
#
#   RAY_USE_TLS          0: run the command without TLS (default: 1)
#   RAY_TLS_CA_CERT      certificate of the cluster's authority (default: ~/.ray/tls/ca.crt)
#   HVP_CA_KEY           its key. If it exists, this machine makes its own certificate (default: ca.key beside RAY_TLS_CA_CERT)
#   RAY_TLS_SERVER_CERT  certificate of this machine (default: HOST.crt beside RAY_TLS_CA_CERT)
#   RAY_TLS_SERVER_KEY   its key (default: the same with .key)
#   RAY_NODE_IP          the address that the certificate must name (default: all addresses of this machine)
#   HVP_TLS_NAMES        further names and addresses under which others call this machine
set -euo pipefail
export RAY_USE_TLS=${RAY_USE_TLS:-1}
case $RAY_USE_TLS in 0 | false) exec "$@" ;; esac
here=$(cd "$(dirname "$0")" && pwd)
export RAY_TLS_CA_CERT=${RAY_TLS_CA_CERT:-${HOME:-}/.ray/tls/ca.crt}
export RAY_TLS_SERVER_CERT=${RAY_TLS_SERVER_CERT:-$(dirname "$RAY_TLS_CA_CERT")/$(hostname).crt}
export RAY_TLS_SERVER_KEY=${RAY_TLS_SERVER_KEY:-${RAY_TLS_SERVER_CERT%.crt}.key}
authority=${HVP_CA_KEY:-$(dirname "$RAY_TLS_CA_CERT")/ca.key}
remedy="copy ~/.ray/tls of the machine where cluster/make_certificate.sh made the authority (or ca.crt and a certificate of \
this machine), see docs/cluster.md; RAY_USE_TLS=0 on all nodes runs the cluster without encryption"
refuse() {
    echo "with_tls.sh: $*: $remedy" >&2
    exit 2
}

read -r -a addresses <<< "${RAY_NODE_IP:-$(hostname --all-ip-addresses)}"
read -r -a names <<< "${HVP_TLS_NAMES:-}"
[ -r "$RAY_TLS_CA_CERT" ] || refuse "the authority's certificate $RAY_TLS_CA_CERT cannot be read"
if [ -r "$authority" ]; then
    HVP_CA_KEY=$authority HVP_CA_CERT=$RAY_TLS_CA_CERT "$here/make_certificate.sh" "$(dirname "$RAY_TLS_SERVER_CERT")" \
        "$(basename "$RAY_TLS_SERVER_CERT" .crt)" "${addresses[@]}" 127.0.0.1 localhost "${names[@]}" ||
        refuse "no certificate could be made with $authority"
fi
for file in "$RAY_TLS_SERVER_CERT" "$RAY_TLS_SERVER_KEY"; do
    [ -r "$file" ] || refuse "$file cannot be read"
done
if ! problem=$(openssl verify -CAfile "$RAY_TLS_CA_CERT" "$RAY_TLS_SERVER_CERT" 2>&1); then
    refuse "$RAY_TLS_SERVER_CERT is not valid ($(grep --max-count=1 error <<< "$problem"))"
fi
if [ "$(openssl x509 -in "$RAY_TLS_SERVER_CERT" -noout -pubkey)" != \
    "$(openssl pkey -in "$RAY_TLS_SERVER_KEY" -pubout 2> /dev/null)" ]; then
    refuse "$RAY_TLS_SERVER_KEY is not the key of $RAY_TLS_SERVER_CERT"
fi
named=
for address in "${addresses[@]}"; do
    ! openssl x509 -in "$RAY_TLS_SERVER_CERT" -noout -checkip "$address" | grep 'does match' > /dev/null || named=yes
done
[ -n "$named" ] || refuse "$RAY_TLS_SERVER_CERT names none of this machine's addresses (${addresses[*]})"
unset HVP_CA_KEY
exec "$@"
