# Sourced by the scripts that find or install what the tests need. They define `say`.
# shellcheck shell=bash

# Runs a command as root, without ever asking for a password.
as_root() {
    if ((EUID == 0)); then "$@" >&2 </dev/null; else sudo -n "$@" >&2 </dev/null; fi
}

can_be_root() {
    ((EUID == 0)) || { type -P sudo >/dev/null && sudo -n true 2>/dev/null; }
}

# Installs packages of Debian. A server's package starts a service on its usual port unless a policy forbids it. A policy that is there already
# stays.
apt_install() {
    local policy=/usr/sbin/policy-rc.d
    as_root apt-get update || say "apt-get update failed; trying with the lists that are there"
    if [[ ! -e $policy ]]; then
        trap 'as_root rm -f /usr/sbin/policy-rc.d' EXIT
        # shellcheck disable=SC2016 # The inner shell expands it.
        as_root sh -c 'printf "#!/bin/sh\nexit 101\n" >"$1" && chmod 755 "$1"' sh "$policy"
    fi
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$@"
}
