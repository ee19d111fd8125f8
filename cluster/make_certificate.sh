#!/usr/bin/env bash
# Make the certificate authority of a cluster, and certificates that it signs.
#
#   make_certificate.sh FOLDER                        ca.crt and ca.key in FOLDER, if they are not there
#   make_certificate.sh FOLDER NAME ADDRESS [...]     also NAME.crt and NAME.key, valid for these host names and IP addresses
#
# ca.key can sign for any node: keep it as secret as the token. Ray compares the address that it calls with the
# certificate, so a node's certificate names its own addresses, and that of the head also the head's name. For gRPC and
# for MLflow's clients both ends need the same ca.crt.
#
# Safe to repeat: the authority (10 years) stays. NAME is made again if it expires within 90 days, or does not name all of them.
#
#   HVP_CA_KEY    the authority's key, if it lies elsewhere
#   HVP_CA_CERT   its certificate, if it lies elsewhere; FOLDER gets a copy
#   HVP_TLS_DAYS  how long NAME is valid (default: 397)
set -euo pipefail
umask 077
folder=${1:?folder}
name=${2:-}
shift $(($# < 2 ? $# : 2))
mkdir -p "$folder"
key=${HVP_CA_KEY:-$folder/ca.key} certificate=${HVP_CA_CERT:-$folder/ca.crt}

if ! command -v openssl > /dev/null; then
    echo "make_certificate.sh: there is no openssl; install your system's package of that name" >&2
    exit 2
fi
exec 9> "$folder/.lock" # processes of a machine may start together, and key and certificate must be of one pair
flock 9
work=$(mktemp --directory "$folder/.XXXXXXXX") # here, so that files are moved at once
trap 'rm -rf "$work"' EXIT
new_key() { openssl ecparam -name prime256v1 -genkey -noout; }

if [ ! -s "$key" ] || [ ! -s "$certificate" ]; then
    if [ -n "${HVP_CA_KEY:-}" ]; then
        echo "make_certificate.sh: no authority in $key and $certificate; make one: cluster/make_certificate.sh FOLDER" >&2
        exit 2
    fi
    if [ -e "$key" ] || [ -e "$certificate" ]; then
        echo "make_certificate.sh: of $key and $certificate only one is there, and a node needs no new authority: restore the" \
            "other one, or delete both for a new authority of the whole cluster" >&2
        exit 2
    fi
    new_key > "$work/ca.key"
    openssl req -x509 -new -key "$work/ca.key" -days 3650 -subj "/CN=hvp_ray cluster authority" -out "$work/ca.crt" \
        -addext basicConstraints=critical,CA:TRUE,pathlen:0 -addext keyUsage=critical,keyCertSign,cRLSign
    mv "$work/ca.crt" "$certificate"
    mv "$work/ca.key" "$key"
fi
[ -n "$name" ] || exit 0
[ "$certificate" -ef "$folder/ca.crt" ] || cp "$certificate" "$folder/ca.crt"
[ $# -gt 0 ] || { echo "make_certificate.sh: $name needs at least one address or host name" >&2; exit 2; }

option() { # ADDRESS: IP or DNS. A host name of digits and dots only does not exist
    case $1 in *:* | *[0-9].[0-9]*.[0-9]*.[0-9]*) echo IP ;; *) echo DNS ;; esac
}
serves() { # whether the certificate that is there names all these addresses
    local address
    for address in "$@"; do
        if [ "$(option "$address")" = IP ]; then set -- -checkip "$address"; else set -- -checkhost "$address"; fi
        openssl x509 -in "$folder/$name.crt" -noout "$@" | grep 'does match' > /dev/null || return 1
    done
}
is_pair() {
    [ "$(openssl x509 -in "$folder/$name.crt" -noout -pubkey)" = "$(openssl pkey -in "$folder/$name.key" -pubout)" ]
}
if [ -s "$folder/$name.crt" ] && [ -s "$folder/$name.key" ] && is_pair 2> /dev/null &&
    openssl x509 -in "$folder/$name.crt" -noout -checkend $((90 * 86400)) > /dev/null 2>&1 &&
    openssl verify -CAfile "$certificate" "$folder/$name.crt" > /dev/null 2>&1 && serves "$@"; then
    exit 0
fi
names=
for address in "$@"; do names+=${names:+,}$(option "$address"):$address; done
new_key > "$work/$name.key"
openssl req -new -key "$work/$name.key" -subj "/CN=hvp_ray ${name:0:50}" -out "$work/request"
printf 'subjectAltName=%s\nextendedKeyUsage=serverAuth,clientAuth\nbasicConstraints=critical,CA:FALSE\n' "$names" \
    > "$work/extensions"
openssl x509 -req -in "$work/request" -CA "$certificate" -CAkey "$key" -set_serial "0x$(openssl rand -hex 16)" \
    -days "${HVP_TLS_DAYS:-397}" -extfile "$work/extensions" -out "$work/$name.crt" 2> "$work/output" ||
    { echo "make_certificate.sh: $key and $certificate do not sign: $(tail -1 "$work/output")" >&2; exit 2; }
mv "$work/$name.key" "$folder/$name.key"
mv "$work/$name.crt" "$folder/$name.crt"
