#!/bin/sh
# Installs the system programs that tests want and Python packages cannot bring, from Debian's packages. Wants root.
# Nothing is started: whoever runs the tests has not asked for a daemon.
set -eu

# program:package
wanted="promtool:prometheus prometheus:prometheus chromium:chromium"

packages=""
for pair in $wanted; do
    command -v "${pair%%:*}" >/dev/null || packages="$packages ${pair#*:}"
done
[ -n "$packages" ] || exit 0

command -v apt-get >/dev/null || { echo "wanted:$packages, which are packages of Debian; apt-get is not here" >&2; exit 1; }
[ "$(id -u)" -eq 0 ] || { echo "wanted: root, to install$packages" >&2; exit 1; }

# A package's scripts ask this program before they start a service: 101 is no.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    trap 'rm -f "$policy"' EXIT
    trap 'exit 1' HUP INT TERM
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod +x "$policy"
fi
answer=0
"$policy" prometheus start >/dev/null 2>&1 || answer=$?
[ "$answer" -eq 101 ] || { echo "$policy lets services start: install$packages yourself" >&2; exit 1; }

export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
# shellcheck disable=SC2086  # several words
apt-get install -qq --yes --no-install-recommends $packages
# Nor at the next boot.
! command -v systemctl >/dev/null || systemctl disable --quiet prometheus.service
