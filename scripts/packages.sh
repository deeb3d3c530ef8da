# Sourced by the scripts that find or install what the tests need. Those scripts define `say`.
# shellcheck shell=bash

# Runs a command as root, without asking for a password.
as_root() {
    if ((EUID == 0)); then "$@" >&2 </dev/null; else sudo -n "$@" >&2 </dev/null; fi
}

can_be_root() {
    ((EUID == 0)) || { type -P sudo >/dev/null && sudo -n true 2>/dev/null; }
}

# How many seconds to wait for another process to release apt's locks. New cloud machines often
# install updates for some minutes.
APT_WAIT=${SHARDLOCK_APT_WAIT:-600}

# Runs apt-get, and repeats it while another process holds one of apt's locks.
apt_get() {
    local output status until=$((SECONDS + APT_WAIT)) has_waited=
    # Only these messages show that another process holds the lock. The errors that follow from it
    # are not worth showing.
    local is_locked='Could not get lock|is another process using it|locked by another process'
    output=$(mktemp)
    while :; do
        status=0
        { as_root env LC_ALL=C DEBIAN_FRONTEND=noninteractive apt-get "$@" 2>&1 || status=$?; echo "$status" >"$output.status"; } |
            tee "$output" | { grep --line-buffered -vE "$is_locked|Unable to lock" || true; } >&2
        status=$(<"$output.status")
        if ((status == 0)) || ! grep -qE "$is_locked" "$output"; then break; fi
        if [[ -z $has_waited ]]; then
            has_waited=1
            say "another process holds a lock of apt; waiting for it, for up to $APT_WAIT s: $(grep -m1 -E "$is_locked" "$output")"
        fi
        if ((SECONDS >= until)); then
            say "a lock of apt was still held after $APT_WAIT s; SHARDLOCK_APT_WAIT sets for how many seconds to wait"
            break
        fi
        sleep 1
    done
    rm -f "$output" "$output.status"
    return "$status"
}

# Installs Debian packages. A server's package starts a service on its default port unless a policy
# forbids it. An existing policy is kept.
apt_install() {
    local policy=/usr/sbin/policy-rc.d
    apt_get update || say "apt-get update failed; trying with the lists that are there"
    if [[ ! -e $policy ]]; then
        trap 'as_root rm -f /usr/sbin/policy-rc.d' EXIT
        # shellcheck disable=SC2016 # The inner shell expands it.
        as_root sh -c 'printf "#!/bin/sh\nexit 101\n" >"$1" && chmod 755 "$1"' sh "$policy"
    fi
    apt_get install -y --no-install-recommends "$@"
}
